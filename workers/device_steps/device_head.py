"""Head and sampler on the device: what is sampled is known there first, and to the host later.

Rows that are sampled from as they are take one recorded step for each batch size and `Kind`. Where
a row wants more (biases, penalties, masks, log-probabilities), the same operations and those more
are launched one by one; the host is not waited for either, but where an answer has to be completed
within its last tokens: what completes it is found on the host.

Shapes: S sampled rows, B the ladder's size for them, E hidden size, V vocabulary.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saqqara.workers.fixed_sizes import graph_sizes
from saqqara.workers.grammar.masks import TokenMasks
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.models.decoder import Decoder
from saqqara.workers.plan import SamplingSpec
from saqqara.workers.sampling import device_sampler
from saqqara.workers.sampling.device_sampler import Kind, SampledRow, adjusted
from saqqara.workers.sampling.sampler import (
    Draw,
    logprob_counts,
    logprobs_of,
    no_token,
    not_finite,
    read_logprobs,
)
from saqqara.workers.state.device_slots import DeviceSlots
from saqqara.workers.transfer import HostCopy, to_device

from .graphs import Graphs, Recorded

_HARMLESS = SamplingSpec(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens that the device has sampled, and on their way to the host.

    Attributes:
        tokens_S: on the device, int64.
        cut: slots whose tokens were not sampled, but chosen so that their answers are complete.
    """

    tokens_S: Tensor
    _rows: Sequence[SampledRow]
    _outcome: HostCopy
    _counts: dict[int, int] = field(default_factory=dict)
    _logprobs: tuple[HostCopy, ...] = ()
    cut: frozenset[int] = frozenset()

    @property
    def is_ready(self) -> bool:
        """Whether they have arrived."""
        return all(copy.has_arrived for copy in (self._outcome, *self._logprobs))

    def take(self) -> list[Draw]:
        """What was sampled, row by row; waits for it."""
        tokens, may_take, is_sound = self._outcome.wait().tolist()
        logprobs = {}
        if self._logprobs:
            logprobs = read_logprobs(self._counts, *(copy.wait() for copy in self._logprobs))
        draws = []
        for place, row in enumerate(self._rows):
            if not may_take[place]:
                draws.append(no_token(bool(is_sound[place]), row.spec, row.position))
                continue
            of_row = logprobs.get(place)
            if of_row is not None and of_row.logprob != of_row.logprob:
                draws.append(Draw(0, error=not_finite(row.position)))
                continue
            draws.append(Draw(tokens[place], of_row))
        return draws


class DeviceHead:
    """Samples on the device. One rank of a tensor group does; the others get its tokens.

    Args:
        decoder: the last stage's.
        mesh: the ranks.
        slots: what the device has of each slot; what is sampled is written there.
        max_num_seqs: rows that are sampled at once, at most.
        graphs: where steps are recorded; None: they are launched by the host.
    """

    def __init__(
        self,
        decoder: Decoder,
        mesh: Mesh,
        slots: DeviceSlots,
        max_num_seqs: int,
        graphs: Graphs | None,
    ) -> None:
        self._decoder = decoder
        self._mesh = mesh
        self._slots = slots
        self._sizes = graph_sizes(max_num_seqs)
        self._graphs = graphs

    def draw(
        self,
        hidden_SE: Tensor,
        rows: Sequence[SampledRow],
        masks: TokenMasks | None,
        at_fault: Collection[int] = (),
        choose: Callable[[int, int], int] | None = None,
    ) -> Drawn:
        """Sample every row, and write the tokens to where the next step finds them.

        Args:
            hidden_SE: the last layer's.
            rows: what is sampled, in order.
            masks: the tokens that their grammars allow, of the rows that have one.
            at_fault: slots for which nothing of what they want is done.
            choose: the token that a slot takes instead of a sampled one (where the answer could
                not be completed after that); None on ranks that do not sample.
        """
        kind = Kind.of((row.spec for row in rows), self._decoder.spec.vocab_size)
        places = np.array([(row.slot, row.position) for row in rows], dtype=np.int64).T.copy()
        counts = logprob_counts([row.spec for row in rows])
        # All ranks decide alike: they meet in the head.
        if counts or not all(row.is_plain for row in rows):
            harmless = [
                replace(row, spec=_HARMLESS) if row.slot in at_fault else row for row in rows
            ]
            wanted = (harmless, masks, choose)
            return self._draw_launched(hidden_SE, *wanted, places, counts, kind)
        outcome_3S = self._replay(hidden_SE, places, kind)
        return Drawn(outcome_3S[0], rows, HostCopy.begin(outcome_3S))

    def record_all(self) -> None:
        """Record the steps of every size and kind, the largest first."""
        if self._graphs is None:
            return
        for size in reversed(self._sizes):
            for kind in reversed(Kind):
                self._record(size, kind)

    def _draw_launched(
        self,
        hidden_SE: Tensor,
        rows: Sequence[SampledRow],
        masks: TokenMasks | None,
        choose: Callable[[int, int], int] | None,
        places_2S: NDArray[np.int64],
        counts: dict[int, int],
        kind: Kind,
    ) -> Drawn:
        logits = self._decoder.logits(hidden_SE)
        there = to_device(places_2S, logits.device)
        cut: frozenset[int] = frozenset()
        if self._mesh.tensor_rank == 0:
            chosen_from = adjusted(logits, rows, masks, self._slots)
            outcome_3S = self._sample(logits, chosen_from, there, kind)
            if choose is not None:
                cut = self._complete(logits, outcome_3S, rows, choose)
        else:
            outcome_3S = self._sample(logits, logits, there, kind)
        outcome_3S = self._agree(outcome_3S, there)
        found: tuple[HostCopy, ...] = ()
        if counts:
            some = to_device(np.array(list(counts), dtype=np.int64), logits.device)
            best = logprobs_of(logits, outcome_3S[0], some, max(counts.values()))
            found = tuple(HostCopy.begin(x) for x in best)
        return Drawn(outcome_3S[0], rows, HostCopy.begin(outcome_3S), counts, found, cut)

    def _complete(
        self,
        logits_SV: Tensor,
        outcome_3S: Tensor,
        rows: Sequence[SampledRow],
        choose: Callable[[int, int], int],
    ) -> frozenset[int]:
        """Write another token where an answer could not be completed in time after the sampled one.

        The host decides, and waits for the device: no row is plain that comes here.

        Returns:
            The slots whose token is another. What forbids the other token leaves the sampled.
        """
        cut: set[int] = set()
        ending = [place for place, row in enumerate(rows) if row.is_ending]
        if not ending:
            return frozenset()
        tokens, may_take, _ = outcome_3S.tolist()
        for place in ending:
            row, sampled = rows[place], tokens[place]
            other = choose(row.slot, sampled) if may_take[place] else sampled
            if other == sampled:
                continue
            only = TokenMasks.only(other, logits_SV.shape[1])
            left_1V = adjusted(logits_SV[place, None], [row], only, self._slots)
            if left_1V[0, other].isfinite():
                outcome_3S[0, place] = other
                cut.add(row.slot)
        return frozenset(cut)

    def _replay(self, hidden_SE: Tensor, places_2S: NDArray[np.int64], kind: Kind) -> Tensor:
        num, place = len(hidden_SE), bisect_left(self._sizes, len(hidden_SE))
        if self._graphs is None or place == len(self._sizes):
            return self._step(hidden_SE, to_device(places_2S, hidden_SE.device), kind)
        size = self._sizes[place]
        recorded = self._graphs.get(("head", size, kind)) or self._record(size, kind)
        padded = _padding(size)
        padded[:, :num] = places_2S
        hidden_BE, places_2B = recorded.inputs
        hidden_BE[:num].copy_(hidden_SE)
        places_2B.copy_(to_device(padded, hidden_SE.device))
        return recorded.replay()[:, :num]

    def _record(self, size: int, kind: Kind) -> Recorded:
        assert self._graphs is not None
        weight = self._decoder.final_norm
        assert weight is not None
        hidden_BE = weight.new_zeros(size, self._decoder.spec.hidden_size)
        places_2B = to_device(_padding(size), weight.device).clone()
        inputs = (hidden_BE, places_2B)
        return self._graphs.record(
            ("head", size, kind), inputs, lambda: self._step(hidden_BE, places_2B, kind)
        )

    def _step(self, hidden_BE: Tensor, places_2B: Tensor, kind: Kind) -> Tensor:
        logits = self._decoder.logits(hidden_BE)
        return self._agree(self._sample(logits, logits, places_2B, kind), places_2B)

    def _sample(self, raw: Tensor, adjusted: Tensor, places_2S: Tensor, kind: Kind) -> Tensor:
        """What one rank samples, int64 [3, S]; room for it on the others."""
        if self._mesh.tensor_rank != 0:
            return torch.zeros(3, len(raw), dtype=torch.int64, device=raw.device)
        slots, positions = places_2S.unbind()
        seeds, filters = self._slots.seeds[slots], self._slots.filters[slots]
        return device_sampler.draw(raw, adjusted, seeds, filters, positions, kind)

    def _agree(self, outcome_3S: Tensor, places_2S: Tensor) -> Tensor:
        """Tell the other ranks, and note the tokens; int64 [3, S]."""
        slots, positions = places_2S.unbind()
        outcome_3S = self._mesh.broadcast(outcome_3S)
        self._slots.put(slots, positions, outcome_3S[0])
        return outcome_3S


def _padding(size: int) -> NDArray[np.int64]:
    """Places of a batch of no sequences: position 0 of slot -1, int64 [2, B]."""
    places = np.zeros((2, size), dtype=np.int64)
    places[0] = -1
    return places
