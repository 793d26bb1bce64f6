"""What a retention allows of prefix reuse: how much of a prompt has to be computed all the same."""

from collections.abc import Iterable, Sequence

from saqqara.compression.growth import ring_size, sums_mass
from saqqara.compression.retention import Retention
from saqqara.workers.plan import WorkerInfo

LEAST_LAYERS = 0.25  # part of the layers; blocks take pages for all, and fewer are not worth that


def why_not_reused(retention: Retention) -> str | None:
    """Why prompts under this retention neither use cached prefixes nor store them; None: they do.

    Queries exist only for tokens that are computed. Of one that propagates see `Cuts`, too.
    """
    looks_at_all = retention.score is not None and retention.score.observes == "all"
    if looks_at_all or sums_mass(retention):
        return "it looks at the attention of all queries of a prompt"
    return None


def least_computed_tokens(retention: Retention, prompt_tokens: int, max_tokens: int) -> int:
    """Last tokens of a prompt that are computed even where all of it is cached.

    They are those whose queries retention looks at when the prompt is through its layers, or where
    a layer drops tokens, and those that are remembered for cuts while decoding; and the last token,
    from which the next is sampled.

    Args:
        retention: one that reuses prefixes (see `why_not_reused`).
        prompt_tokens: length of the prompt.
        max_tokens: of prompt and output together.
    """
    seen = retention.num_window_queries(prompt_tokens)
    remembered = ring_size(retention, prompt_tokens, max_tokens)
    propagate = retention.propagate
    selecting = 0 if propagate is None else propagate.recent_tokens(prompt_tokens)
    return min(max(1, seen, remembered, selecting), prompt_tokens)


def keeps_whole_prompt(retention: Retention, prompt_tokens: int) -> bool:
    """Whether rows of layers that see all tokens keep all of such a prompt and are never cut.

    Then they hold the pages of cached blocks themselves, instead of copies of what they have.
    """
    is_cut = retention.propagate is not None or retention.decode is not None
    return not is_cut and not retention.drops(prompt_tokens)


class Cuts:
    """Up to which layer prompts use blocks on a replica, where their retention propagates.

    In layers that all tokens enter, keys and values are those of any prompt. Behind the first layer
    that drops tokens, cached ones among those that go on need hidden states: blocks have these in
    pages of the rows behind it, on the stage of the next layer.

    Args:
        workers: of the replica.
    """

    def __init__(self, workers: Sequence[WorkerInfo]) -> None:
        self._workers = workers
        self._num_layers = max(worker.stop_layer for worker in workers)

    def first(self, retention: Retention, prompt_tokens: int) -> int | None:
        """The first layer that drops tokens of such a prompt; None: no layer does."""
        if retention.propagate is None:
            return None
        return retention.propagate.first_cut(prompt_tokens, self._num_layers)

    def why_not_reused(self, retention: Retention, prompt_tokens: int) -> str | None:
        """Why such prompts neither use cached prefixes nor store them; None: they do."""
        cut = self.first(retention, prompt_tokens)
        if cut is None:
            return None
        if cut + 1 < LEAST_LAYERS * self._num_layers:
            return (
                f"all tokens go through {cut + 1} of {self._num_layers} layers only, and blocks "
                "take pages for all of them"
            )
        for worker in self._workers:
            if not worker.start_layer <= cut + 1 < worker.stop_layer:
                continue
            rows = (worker.stop_layer - cut - 1) * (worker.stop_head - worker.start_head)
            if rows * worker.page_bytes < worker.page_tokens * worker.hidden_bytes:
                return (
                    f"the pages of {rows} rows behind layer {cut} of rank {worker.rank} have no "
                    "room for its hidden states"
                )
        return None


def most_shared_blocks(workers: Sequence[WorkerInfo], rows_W: Iterable[int]) -> int | None:
    """Blocks whose pages rows may hold, counted once for each sequence; None: any number.

    Args:
        workers: of a replica.
        rows_W: rows that a sequence has on each.
    """
    limits = zip((w.most_shared_entries for w in workers), rows_W, strict=True)
    return min((most // rows for most, rows in limits if most is not None), default=None)
