"""How long a step takes on a rank: a roofline, and what ranks exchange.

Products take their number over the device's rate, weights and keys and values their bytes over its
bandwidth, the larger of the two, over the share of that limit that is reached (`Factors`); where
a product copies its weights before it multiplies (`Device.product_bandwidth`), the sum of the two.
What ranks exchange and what the host needs to launch a layer come on top.

    prefill = linear / f.prefill_linear + attention / f.prefill_attention + exchange
    decode  = linear / f.decode_linear + attention / f.decode_attention + exchange

On a GPU kernels are launched while others run, so a step takes as long as the longer of computing
and launching; one rank alone replays a recorded step and launches nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from saqqara.workers.footprint import Footprint

from .devices import Device
from .models import PlannedModel


@dataclass(frozen=True, slots=True)
class Factors:
    """What is reached of the limits, and what comes besides.

    Attributes:
        prefill_linear, prefill_attention: share of the limit of products in prefill.
        decode_linear: share of the limit of reading weights, or multiplying with them, in decode.
        decode_attention: share of the limit of reading keys and values.
        link: share of the bandwidth between ranks.
        layer_seconds: for the host to launch a layer; on a CPU nothing is computed meanwhile, and
            other threads are no help.
        step_seconds: of the controller in every step, while no worker computes.
    """

    prefill_linear: float = 0.6
    prefill_attention: float = 0.45
    decode_linear: float = 0.75
    decode_attention: float = 0.75
    link: float = 0.7
    layer_seconds: float = 200e-6
    step_seconds: float = 2e-3

    @classmethod
    def default(cls, kind: str, attention_backend: str | None = None) -> "Factors":
        """Before anything was measured, by the `kind` of a device.

        On a CPU torch's attention reaches less than our kernels', which None stands for, and takes
        some dozen calls in each layer, which they do in one.
        """
        if kind != "cpu":
            return cls()
        prefill, decode, layer_seconds = 0.8, 0.75, 50e-6
        if attention_backend == "torch":
            prefill, decode, layer_seconds = 0.5, 0.2, 800e-6
        return cls(0.8, prefill, 0.5, decode, 0.7, layer_seconds, step_seconds=1e-3)


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds of a step on one rank at the device's limits, before any factor."""

    linear: float = 0.0
    attention: float = 0.0
    exchange: float = 0.0
    exchange_waits: float = 0.0
    num_layers: int = 0


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of prefills and decode steps of a model's ranks.

    Attributes:
        model: what is computed.
        device: where each rank computes.
        factors: what is reached of its limits.
        ranks_on_node: ranks that share a node.
        hops_between_nodes: whether a stage sends to another node.
    """

    model: PlannedModel
    device: Device
    factors: Factors
    ranks_on_node: int = 1
    hops_between_nodes: bool = False

    def prefill_seconds(
        self, rank: Footprint, entering: Sequence[int], group_tokens: int, num_prompts: float = 1
    ) -> float:
        """Time of one prompt on a rank, `entering` tokens in each layer of the model.

        Args:
            rank: whose time it is.
            entering: tokens that enter each layer, [L].
            group_tokens: of all prompts that are computed together; weights are read once for them.
            num_prompts: whose next token is sampled.
        """
        terms = self.prefill_terms(rank, entering, group_tokens, num_prompts)
        f = self.factors
        busy = terms.linear / f.prefill_linear + terms.attention / f.prefill_attention
        return self._with_rest(rank, terms, busy)

    def group_seconds(
        self, rank: Footprint, prompts: Sequence[Sequence[int]], times: int = 1
    ) -> float:
        """Time on a rank of prompts that are computed together.

        Args:
            rank: whose time it is.
            prompts: of each, what enters each layer.
            times: how often each of them is there.
        """
        group_tokens = times * sum(entering[0] for entering in prompts)
        each = [self.prefill_terms(rank, entering, group_tokens) for entering in prompts]
        terms = Terms(
            linear=times * sum(one.linear for one in each),
            attention=times * sum(one.attention for one in each),
            exchange=times * sum(one.exchange for one in each),
            exchange_waits=each[0].exchange_waits,
            num_layers=each[0].num_layers,
        )
        f = self.factors
        busy = terms.linear / f.prefill_linear + terms.attention / f.prefill_attention
        return self._with_rest(rank, terms, busy)

    def decode_seconds(self, rank: Footprint, num_seqs: float, attended_tokens: float) -> float:
        """Time of a decode step on a rank.

        Args:
            rank: whose time it is.
            num_seqs: sequences that are fed a token each.
            attended_tokens: that each of them reads, summed over the rank's rows.
        """
        terms = self.decode_terms(rank, num_seqs, attended_tokens)
        f = self.factors
        busy = terms.linear / f.decode_linear + terms.attention / f.decode_attention
        return self._with_rest(rank, terms, busy)

    def prefill_terms(
        self, rank: Footprint, entering: Sequence[int], group_tokens: int, num_prompts: float = 1
    ) -> Terms:
        """The limits of one prompt; arguments as of `prefill_seconds`."""
        spec, heads = rank.spec, rank.heads
        size = rank.dtype.itemsize
        tokens_in = entering[0]
        share = min(1.0, tokens_in / group_tokens)
        layer = rank.attention_numbers + rank.mean_mlp_numbers(tokens_in / share)
        active = rank.attention_numbers + rank.mean_mlp_numbers()
        in_front = (len(heads.query) + 2 * len(heads.kv)) * spec.head_dim * spec.hidden_size
        linear = attention = exchanged = 0.0
        for number in rank.layers:
            tokens = entering[number]
            is_last = number == spec.num_layers - 1
            products: float = tokens * active
            window = spec.layers.windows[number]
            pairs = _pairs(tokens, window)
            if is_last:  # queries and MLP only where the next token comes from
                products = tokens * in_front + num_prompts * (active - in_front)
                pairs = (min(tokens, window) if window else tokens) * num_prompts
            rows = tokens / share
            linear += self._product(2 * products, share * layer * size, rows)
            attention += self._limit(4 * pairs * len(heads.query) * spec.head_dim, 0.0)
            exchanged += (num_prompts if is_last else tokens) * spec.hidden_size * size
        if rank.is_last_stage:
            head = rank.head_numbers
            rows = num_prompts / share
            linear += self._product(2 * num_prompts * head, share * head * size, rows)
        if rank.is_first_stage:  # the embedding is reduced once
            exchanged += tokens_in * spec.hidden_size * size / 2
        sent = 0 if rank.is_last_stage else entering[rank.layers.stop]
        return self._terms(rank, linear, attention, 2 * exchanged, num_prompts, sent)

    def decode_terms(self, rank: Footprint, num_seqs: float, attended_tokens: float) -> Terms:
        """The limits of a step; arguments as of `decode_seconds`."""
        spec, size, num_layers = rank.spec, rank.dtype.itemsize, len(rank.layers)
        read = num_layers * (rank.attention_numbers + rank.mean_mlp_numbers(num_seqs))
        used = num_layers * (rank.attention_numbers + rank.mean_mlp_numbers())
        if rank.is_last_stage:
            read, used = read + rank.head_numbers, used + rank.head_numbers
        linear = self._product(2 * num_seqs * used, read * size, num_seqs)
        queries_per_row = len(rank.heads.query) / len(rank.heads.kv)
        tokens = num_seqs * attended_tokens
        attention = self._limit(
            4 * tokens * queries_per_row * spec.head_dim,
            tokens * spec.kv_bytes_per_row_token(rank.dtype),
        )
        num_reduced = 2 * num_layers + int(rank.is_first_stage)  # and the embedding
        reduced = num_reduced * num_seqs * spec.hidden_size * size
        return self._terms(rank, linear, attention, reduced, num_seqs, num_seqs)

    def _terms(
        self,
        rank: Footprint,
        linear: float,
        attention: float,
        reduced: float,
        sampled: float,
        sent: float,
    ) -> Terms:
        """Terms with what is exchanged.

        Args:
            rank: whose terms they are.
            linear: seconds.
            attention: seconds.
            reduced: bytes in all-reduces, two in every layer.
            sampled: tokens whose logits are gathered.
            sent: tokens that go on to the next stage.
        """
        device, spec, size = self.device, rank.spec, rank.dtype.itemsize
        tensor_size = rank.layout.tensor_size
        others = (tensor_size - 1) / tensor_size
        seconds = waits = 0.0
        if others:
            # A ring sends every byte twice, but for the part that a rank has itself.
            seconds += 2 * others * reduced / device.link_bandwidth
            waits += 2 * len(rank.layers) * 2 * device.link_seconds
        if others and rank.is_last_stage:
            seconds += others * sampled * spec.vocab_size * size / device.link_bandwidth
            waits += device.link_seconds
        if not rank.is_last_stage:
            far = self.hops_between_nodes
            bandwidth = device.node_bandwidth if far else device.link_bandwidth
            seconds += sent * spec.hidden_size * size / bandwidth
            waits += device.node_seconds if far else device.link_seconds
        return Terms(linear, attention, seconds, waits, len(rank.layers))

    def _with_rest(self, rank: Footprint, terms: Terms, busy: float) -> float:
        """Seconds with what is exchanged and launched."""
        f = self.factors
        busy += terms.exchange / f.link + terms.exchange_waits
        launches = terms.num_layers * f.layer_seconds
        if self.device.kind == "cpu":
            return busy + launches
        return busy if rank.layout.world_size == 1 else max(busy, launches)

    def _limit(self, products: float, num_bytes: float) -> float:
        """Seconds of the longer of computing and reading."""
        return self._product(products, num_bytes, 1)

    def _product(self, products: float, num_bytes: float, rows: float) -> float:
        """Seconds of `rows` times weights, on the device's part that is this rank's."""
        share = self.device.share_of(self.ranks_on_node)
        return self.device.product_seconds(products, num_bytes, rows) / share


def _pairs(num_tokens: float, window: int) -> float:
    """Queries times the keys that each sees: all before it, or those of its window (0: none)."""
    alike = max(num_tokens - window, 0.0) if window else 0.0
    growing = num_tokens - alike
    return growing * growing / 2 + alike * window
