"""What of a request depends on the model and its workers, checked before anything is queued."""

from collections.abc import Sequence
from dataclasses import dataclass

from saqqara.compression.growth import num_ring_queries
from saqqara.compression.retention import Retention
from saqqara.configs.shown import shown
from saqqara.workers.models.spec import ModelSpec
from saqqara.workers.plan import WorkerInfo

MAX_PRIORITY = 2**31 - 1
_DTYPE_BYTES = {"float32": 4}  # else 2
_MIN_RING_QUERIES = 64  # remembered whatever the pool: all presets need at most half of them


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise a ValueError that names the first of them that is no token of the model."""
    for place, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise ValueError(f"{field}[{place}] must be a token id, not {shown(token_id)}")
        if not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{field}[{place}]={shown(token_id)} is no token of the model; they are 0 to "
                f"{vocab_size - 1}"
            )


def check_priority(priority: object) -> None:
    """Raise a ValueError unless it is an integer of 32 bits."""
    is_integer = isinstance(priority, int) and not isinstance(priority, bool)
    if not is_integer or not -MAX_PRIORITY - 1 <= priority <= MAX_PRIORITY:  # type: ignore[operator]
        raise ValueError(
            f"priority: must be an integer of at least {-MAX_PRIORITY - 1} and at most "
            f"{MAX_PRIORITY}, not {shown(priority)}"
        )


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """What retentions may ask of one engine.

    Attributes:
        num_layers: of the model.
        num_query_heads: of each of its layers.
        num_kv_heads: of each of its layers.
        max_ring_queries: of one sequence that a worker may remember while it decodes.
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    max_ring_queries: int

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        workers: Sequence[WorkerInfo],
        max_num_seqs: int,
        own: Retention,
    ) -> "RetentionLimits":
        """Those of an engine: what `own`, its own retention, needs is always allowed.

        Rings lie outside the page pool, so a sequence may take as much for its ring as its share of
        the pool is.
        """
        most = min(_share_in_queries(worker, spec, max_num_seqs) for worker in workers)
        most = max(most, num_ring_queries(own), _MIN_RING_QUERIES)
        return cls(spec.num_layers, spec.num_query_heads, spec.num_kv_heads, most)

    def check(self, retention: Retention) -> None:
        """Raise a ValueError that names the setting which this engine cannot meet."""
        try:
            self._check(retention)
        except ValueError as error:
            raise ValueError(f"retention: {error}") from None

    def _check(self, retention: Retention) -> None:
        retention.entering_tokens(1, self.num_layers)
        retention.row_tokens(1, self.num_layers, self.num_kv_heads)
        if retention.profile is not None:
            retention.profile.check(self.num_layers, self.num_query_heads)
        if num_ring_queries(retention) > self.max_ring_queries:
            raise ValueError(
                f"window: with decode, workers remember the queries of the last {retention.window} "
                f"tokens; they have room for {self.max_ring_queries} per sequence (the share of "
                "one in max_num_seqs of the KV pool)"
            )


def _share_in_queries(worker: WorkerInfo, spec: ModelSpec, max_num_seqs: int) -> int:
    """How many tokens' queries take as many bytes as one sequence's share of a worker's pages."""
    rows = (worker.stop_layer - worker.start_layer) * (worker.stop_head - worker.start_head)
    query_bytes = rows * spec.group_size * spec.head_dim * _DTYPE_BYTES.get(worker.dtype, 2)
    return worker.num_pages * worker.page_bytes // (max_num_seqs * query_bytes)
