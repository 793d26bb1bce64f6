"""What one rank's part of a model takes, by arithmetic alone: no torch.

`sizing.py`, the shard and the planner count with these; a worker's own figures are the same bytes.
"""

from dataclasses import dataclass
from typing import Any

from saqqara.compression.decode import DecodeStage
from saqqara.compression.growth import most_ring_size, remembers_normalisers, sums_mass
from saqqara.compression.retention import Retention

from .fixed_sizes import (
    DEVICE_DRAWN_BYTES,
    MAX_SPLITS,
    SAMPLED_ROWS,
    SPLIT_TOKENS,
    graph_sizes,
    most_shared_entries,
    most_splits,
    num_entries,
    pages_beside_tables,
    sampling_bytes,
)
from .mesh.layout import (
    MeshLayout,
    StageCosts,
    head_shard,
    layer_split,
)
from .models.counting.rank_weights import RankWeights, check_channels
from .models.spec import ItemSize, ModelSpec

GIB = 1024**3
NORMALISER_BYTES = 4  # float32
SUM_BYTES = 4  # float32
_FLOAT_BYTES = 4
_ENTRY_BYTES = 4  # int32, of a page table entry and of a row's length
_PLACE_BYTES = 8  # int64, where a row's entries begin
_TOKEN_BYTES = 4  # int32
_SETTING_BYTES = 8 + 4 * 8  # a seed, and four numbers that filter
# The head runs for sampled positions only, so in a step that also prefills it costs a part of what
# its weights, counted in layers, would suggest.
_HEAD_SHARE = 0.25
# What stages are balanced for: it must be known before anything is, and alike to planner and ranks.
_BALANCED_SEQS, _BALANCED_TOKENS = 128, 4096
_DRAWING_KINDS = 3
_WORKSPACE_BYTES = 64 << 20  # cuBLAS's and cuBLASLt's of the recording stream, 32 MiB each at most
_KERNEL_BYTES = 8 << 10  # of a recorded kernel in the driver, and this many kernels in a layer
_LAYER_KERNELS = 13
_HEAD_KERNELS, _DRAWING_KERNELS = 40, 100  # of all ways to draw; the second for each piece


def stage_layers(
    spec: ModelSpec,
    num_stages: int,
    explicit: tuple[int, ...] | None = None,
    retention: Retention | None = None,
) -> tuple[range, ...]:
    """The layers of each pipeline stage; errors as `layer_split`'s.

    The one function by which planner, simulator and ranks cut a model. Without `explicit`, stages
    are balanced for the engine's own `retention`; None: full.
    """
    costs = None if retention is None else stage_costs(spec, retention)
    head_layers = _HEAD_SHARE * spec.head_layers
    return layer_split(spec.num_layers, num_stages, head_layers, explicit, costs)


def stages_under(
    spec: ModelSpec,
    num_stages: int,
    explicit: tuple[int, ...] | None,
    retention: str | dict[str, Any],
    budget: int | str | None,
) -> tuple[range, ...]:
    """`stage_layers` under a retention as the engine's settings spell it."""
    return stage_layers(spec, num_stages, explicit, Retention.parse(retention, budget))


def stage_costs(spec: ModelSpec, retention: Retention) -> StageCosts | None:
    """What layers cost that keep, or let in, more than others; None where all are alike.

    Half of the time is prefill, which multiplies with a layer's weights for the tokens that enter
    it, half decode, which reads the weights and what the layer keeps. Counted for 128 sequences of
    4,096 tokens; a retention that cannot be had for prompts so long counts as full.
    """
    num_layers = spec.num_layers
    try:
        entering = retention.entering_tokens(_BALANCED_TOKENS, spec.layers)
        rows = retention.row_tokens(_BALANCED_TOKENS, spec.layers, spec.num_kv_heads)
    except ValueError:
        return None
    kept = rows.sum(axis=1).tolist()
    weights = [spec.parameters_of(layer) for layer in range(num_layers)]
    if all(len(set(of_layers)) == 1 for of_layers in (kept, entering, weights)):
        return None
    of_a_token = _BALANCED_SEQS * 2 * spec.head_dim  # in a row: keys and values
    numbers = [weight + of_a_token * tokens for weight, tokens in zip(weights, kept, strict=True)]
    mean_numbers, mean_entering = sum(numbers) / num_layers, sum(entering) / num_layers
    num_bytes = tuple(each / mean_numbers for each in numbers)
    return StageCosts(
        seconds=tuple(
            (tokens / mean_entering + read) / 2
            for tokens, read in zip(entering, num_bytes, strict=True)
        ),
        num_bytes=num_bytes,
        end_bytes=spec.head_parameters / mean_numbers,
        end_layers=spec.head_layers,
    )


@dataclass(frozen=True, slots=True)
class Footprint(RankWeights):
    """One rank's part in numbers."""

    @classmethod
    def of_ranks(
        cls,
        spec: ModelSpec,
        dtype: ItemSize,
        layout: MeshLayout,
        split: tuple[int, ...] | None = None,
        retention: Retention | None = None,
    ) -> "tuple[Footprint, ...]":
        """Every rank of a replica, by rank; arguments as `stage_layers`'.

        Raises:
            ValueError: the model cannot be cut like this; names the setting.
        """
        stages = stage_layers(spec, layout.pipeline_size, split, retention)
        size = layout.tensor_size
        heads = [head_shard(spec.num_query_heads, spec.num_kv_heads, size, t) for t in range(size)]
        check_channels(spec, size)
        return tuple(
            cls(
                spec,
                dtype,
                layout,
                rank,
                stages[layout.pipeline_rank(rank)],
                heads[layout.tensor_rank(rank)],
            )
            for rank in range(layout.world_size)
        )

    @property
    def num_rows(self) -> int:
        """Rows of one sequence: layers x kv heads."""
        return len(self.layers) * len(self.heads.kv)

    def page_bytes(self, page_tokens: int) -> int:
        """Bytes of one page."""
        return page_tokens * self.spec.kv_bytes_per_row_token(self.dtype)

    def mirror_entries(
        self, num_pages: int, max_num_seqs: int, max_model_len: int, page_tokens: int
    ) -> int:
        """Page table entries on a device that is not the host, beside a pool of so many pages."""
        pages_per_row = -(-max_model_len // page_tokens)
        return num_entries(num_pages, max_num_seqs * self.num_rows, pages_per_row)

    def most_shared_entries(
        self, num_pages: int, max_num_seqs: int, max_model_len: int, page_tokens: int
    ) -> int | None:
        """Of these entries, how many may be of pages that other rows hold, too; None: all."""
        pages_per_row = -(-max_model_len // page_tokens)
        return most_shared_entries(num_pages, max_num_seqs * self.num_rows, pages_per_row)

    def table_bytes(
        self,
        max_num_seqs: int,
        max_model_len: int,
        page_tokens: int,
        mirrored_pages: int | None = None,
    ) -> int:
        """Bytes of the page tables and lengths of all rows, where attention finds them.

        Args:
            max_num_seqs: slots.
            max_model_len: tokens of the longest row.
            page_tokens: tokens of a page.
            mirrored_pages: pages of the pool, where the device is not the host; None: it is, and
                tables are address space for the longest rows.
        """
        rows = max_num_seqs * self.num_rows
        if mirrored_pages is None:
            return rows * (-(-max_model_len // page_tokens) + 1) * _ENTRY_BYTES  # and the length
        entries = self.mirror_entries(mirrored_pages, max_num_seqs, max_model_len, page_tokens)
        return entries * _ENTRY_BYTES + rows * (_PLACE_BYTES + _ENTRY_BYTES)

    def slot_bytes(self, max_num_seqs: int, max_model_len: int) -> int:
        """Bytes of what a device that samples knows of all slots: tokens, seeds, filters."""
        return (max_num_seqs + 1) * ((max_model_len + 1) * _TOKEN_BYTES + _SETTING_BYTES)

    def rotary_bytes(self, max_model_len: int) -> int:
        """Bytes of the cosines and sines of all positions, for each kind of its layers."""
        kinds = {self.spec.rope_of(layer) for layer in self.layers}
        return len(kinds) * 2 * max_model_len * (self.spec.head_dim // 2) * _FLOAT_BYTES

    def ring_query_bytes(self) -> int:
        """Bytes of a query that a ring remembers, in all layers."""
        return len(self.layers) * len(self.heads.query) * self.spec.head_dim * self.dtype.itemsize

    def ring_normaliser_bytes(self) -> int:
        """Bytes of a query's normalisers, in all layers."""
        return len(self.layers) * len(self.heads.query) * NORMALISER_BYTES

    def _remembered_bytes(self, retention: Retention) -> int:
        """Bytes of a remembered query, and of its normalisers where these are, in all layers."""
        normalisers = self.ring_normaliser_bytes() if remembers_normalisers(retention) else 0
        return self.ring_query_bytes() + normalisers

    def rings_and_sums_bytes(
        self, retention: Retention, max_num_seqs: int, max_model_len: int, page_tokens: int
    ) -> int:
        """Bytes of every slot's ring and sums, were all under this retention."""
        ring_size = most_ring_size(retention, max_model_len)
        slot_bytes = ring_size * self._remembered_bytes(retention)
        if sums_mass(retention):
            assert isinstance(retention.decode, DecodeStage)
            spec = self.spec
            rows = retention.row_tokens(max_model_len, spec.layers, spec.num_kv_heads)
            rows = rows[list(spec.layers.global_layers)]
            slack = retention.decode.slack_pages * page_tokens
            slot_bytes += SUM_BYTES * self.num_rows * (int(rows.max()) + slack)
        return max_num_seqs * slot_bytes

    def sampler_bytes(
        self, max_num_seqs: int, max_model_len: int, *, on_device: bool = True
    ) -> int:
        """Bytes of logits and of what sampling every slot holds beside them; 0 without a head.

        `on_device`: the device decides how rows are drawn from, not the host.
        """
        if not self.is_last_stage:
            return 0
        return sampling_bytes(
            max_num_seqs, self.spec.vocab_size, max_model_len, on_device=on_device
        )

    def scratch_bytes(self, max_model_len: int) -> int:
        """Bytes of the temporaries of one decoded token; layers use the same memory in turn."""
        hidden, dim, size = self.spec.hidden_size, self.spec.head_dim, self.dtype.itemsize
        num_queries = len(self.heads.query)
        fused = (num_queries + 2 * len(self.heads.kv)) * dim
        attended = num_queries * dim * size
        # Also of the layer before, until this one's are there: the fused projection, the output.
        held = (hidden + fused) * size + attended
        splits = most_splits(max_model_len, SPLIT_TOKENS)
        if splits > 1:
            attended += num_queries * (dim + 1) * _FLOAT_BYTES * MAX_SPLITS
            held += self.num_rows * splits * _ENTRY_BYTES  # the list of all parts
        project = hidden + fused  # normed, fused
        finish = 2 * hidden + 3 * self.num_channels  # sum, normed, gate-up, activated
        return held + max(max(project, finish) * size, attended)

    def graph_bytes(self, max_num_seqs: int, max_model_len: int, retention: Retention) -> int:
        """Bytes that recorded steps hold, with what they note for cuts of this retention.

        Partly an allowance: for what the driver keeps.
        """
        largest, of_token = graph_sizes(max_num_seqs)[-1], self.scratch_bytes(max_model_len)
        notes = most_ring_size(retention, max_model_len) > 0
        if notes:
            of_token += self._remembered_bytes(retention)
        recorded = self.recorded_bytes(max_num_seqs, kinds=1 + notes)
        temporary = largest * of_token + self.recorded_sampling_bytes(largest)
        return temporary + recorded + self._driver_bytes(max_num_seqs, kinds=1 + notes)

    def recorded_sampling_bytes(self, num_seqs: int) -> int:
        """Bytes of the temporaries of a recorded sampling step; 0 without a head."""
        if not self.is_last_stage:
            return 0
        row, size = self.spec.vocab_size, self.dtype.itemsize
        gathered = 2 if self.layout.tensor_size > 1 else 1
        product = num_seqs * row * max(gathered * size, _FLOAT_BYTES + size)
        drawn = min(num_seqs, SAMPLED_ROWS) * row * DEVICE_DRAWN_BYTES
        normed = num_seqs * self.spec.hidden_size * size
        return max(product + normed, num_seqs * row * _FLOAT_BYTES + drawn)

    def recorded_bytes(self, max_num_seqs: int, kinds: int) -> int:
        """Bytes of the inputs and outputs of all recorded steps, of so many kinds for each size."""
        hidden = self.spec.hidden_size * self.dtype.itemsize
        row = 3 * _PLACE_BYTES + hidden  # of a decode step: who takes part, and what comes out
        if not self.is_first_stage:
            row += hidden
        row *= kinds
        if self.is_last_stage:  # hidden states, two numbers where, three what, for each way to draw
            row += _DRAWING_KINDS * (hidden + 5 * _PLACE_BYTES)
        return sum(graph_sizes(max_num_seqs)) * row

    def _driver_bytes(self, max_num_seqs: int, kinds: int) -> int:
        """What CUDA keeps of recorded kernels, and cuBLAS for the stream: an allowance."""
        sizes = graph_sizes(max_num_seqs)
        kernels = kinds * len(sizes) * len(self.layers) * _LAYER_KERNELS
        if self.is_last_stage:
            pieces = sum(-(-size // SAMPLED_ROWS) for size in sizes)
            kernels += len(sizes) * _HEAD_KERNELS + pieces * _DRAWING_KERNELS
        return kernels * _KERNEL_BYTES + _WORKSPACE_BYTES

    def pages_within(
        self,
        pool_bytes: float,
        max_num_seqs: int,
        max_model_len: int,
        page_tokens: int,
        *,
        with_mirror: bool = False,
    ) -> int:
        """Pages of a pool of at most so many bytes: no more than all slots at full length need.

        `with_mirror`: the tables of `table_bytes` with mirrored pages lie in these bytes, too.
        """
        rows, pages_per_row = max_num_seqs * self.num_rows, -(-max_model_len // page_tokens)
        windows = [self.spec.layers.windows[layer] or max_model_len for layer in self.layers]
        of_slot = sum(-(-min(tokens, max_model_len) // page_tokens) for tokens in windows)
        most = max_num_seqs * len(self.heads.kv) * of_slot
        page_bytes = self.page_bytes(page_tokens)
        if not with_mirror:
            return min(int(pool_bytes // page_bytes), most)
        left = pool_bytes - rows * (_PLACE_BYTES + _ENTRY_BYTES)
        pages = pages_beside_tables(left, page_bytes, _ENTRY_BYTES, rows, pages_per_row)
        return min(pages, most)


def replica_rows(footprints: "tuple[Footprint, ...]") -> int:
    """Rows of one sequence on all ranks of a replica; shared ones count on each."""
    return sum(footprint.num_rows for footprint in footprints)
