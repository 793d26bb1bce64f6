"""The end of the last stage: from hidden states to sampled tokens and scored ones.

Shapes: S sampled positions, T decoded tokens, M scored tokens of one sequence, E hidden size,
V vocabulary, N tokens of a prompt, K best tokens.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saqqara.workers.device_steps.device_head import DeviceHead
from saqqara.workers.grammar.masks import TokenMasks
from saqqara.workers.grammar.matchers import Matchers
from saqqara.workers.mesh.mesh import Mesh
from saqqara.workers.models.decoder import Decoder, chunks
from saqqara.workers.plan import (
    FaultCode,
    NewSequence,
    PromptScores,
    SampledToken,
    ScoredTokens,
    StepPlan,
)
from saqqara.workers.sampling.device_sampler import SampledRow, check_ids
from saqqara.workers.sampling.sampler import Draw, TokenHistory, not_finite, sample
from saqqara.workers.state.faults import Faults
from saqqara.workers.state.slots import SlotTable, Target, ended
from saqqara.workers.transfer import to_device

SCORE_CHUNK_TOKENS = 256  # bounds the logits of scoring: 256 x V fp32


class Head:
    """Samples and scores what a plan asks for, given the last layer's hidden states.

    What cannot be sampled or scored is a fault of its sequence.

    Every tensor rank computes its vocabulary shard; rank 0 samples and broadcasts, so that ranks
    cannot diverge.

    Args:
        decoder: the last stage's.
        mesh: the ranks.
        slots: what is known of each slot's sequence.
        faults: where sequences that cannot go on are told.
        matchers: of the answers that have a grammar, on rank 0; None on the others.
        on_device: samples without waiting for the device; None: the host samples.
    """

    def __init__(
        self,
        decoder: Decoder,
        mesh: Mesh,
        slots: SlotTable,
        faults: Faults,
        matchers: Matchers | None,
        on_device: DeviceHead | None = None,
    ) -> None:
        self._matchers = matchers
        self._on_device = on_device
        self._decoder = decoder
        self._mesh = mesh
        self._slots = slots
        self._faults = faults

    def open(self, new: NewSequence) -> None:
        """Note a new sequence: its matcher begins where its known tokens end."""
        grammar = new.sampling.grammar
        if self._matchers is None or grammar is None or new.score:
            return
        known = new.tokens()[new.prompt_tokens :].tolist()
        try:
            self._matchers.open(new.slot, grammar, known, new.sampling.complete_within)
        except ValueError as error:
            self._faults.add(new.slot, _of_grammar(str(error)), "constraint_failed")

    def close(self, slot: int) -> None:
        """Note that a slot is free."""
        if self._matchers is not None:
            self._matchers.close(slot)

    def sample(
        self,
        plan: StepPlan,
        targets: list[Target],
        finals: dict[int, Tensor],
        decoded_TE: Tensor | None,
    ) -> "Sampling":
        """Sample every target, in order, and record the tokens in the slot table.

        `finals` maps slots whose prefill ended to their last hidden state [E].
        """
        if not targets:
            return Sampling()
        rows = _sampled_rows(plan, targets, finals, decoded_TE)
        if self._on_device is not None:
            return self._draw(self._on_device, rows, targets)
        logits_SV = self._decoder.logits(rows)
        sampled = self._sample(logits_SV, targets, self._masks(targets))
        cut = self._complete(logits_SV, targets, sampled)
        agreed = torch.tensor([draw.token_id for draw in sampled], device=logits_SV.device)
        if self._mesh.layout.tensor_size > 1:
            agreed = self._mesh.broadcast(agreed)
            token_ids = agreed.tolist()
            sampled = [
                draw._replace(token_id=t) for draw, t in zip(sampled, token_ids, strict=True)
            ]
        return Sampling(agreed, self._record(targets, sampled, cut))

    def _draw(self, head: DeviceHead, hidden_SE: Tensor, targets: list[Target]) -> "Sampling":
        """Let the device sample; its tokens are recorded here once somebody asks for them."""
        held = [self._slots[t.slot] for t in targets]
        rows = [
            SampledRow(t.slot, t.position, slot.prompt_tokens, slot.sampling)
            for t, slot in zip(targets, held, strict=True)
        ]
        for row in rows:
            with self._faults.blame([row.slot], "sampling", is_local=True):
                check_ids(row, self._decoder.spec.vocab_size)
        at_fault = {row.slot for row in rows if row.slot in self._faults}
        choose = None if self._matchers is None else self._matchers.choose
        drawn = head.draw(hidden_SE, rows, self._masks(targets), at_fault, choose)
        return Sampling(
            drawn.tokens_S,
            lambda: self._record(targets, drawn.take(), drawn.cut),
            lambda: drawn.is_ready,
        )

    def _record(
        self, targets: list[Target], draws: list[Draw], cut: Collection[int]
    ) -> list[SampledToken]:
        """Note what was sampled; the tokens of faulty rows count for nothing.

        `cut` are the slots of which another token than the sampled one was taken.
        """
        for target, draw in zip(targets, draws, strict=True):
            self._slots.put_token(target, draw.token_id)
            if draw.error is not None:
                self._blame(target, draw.error, draw.code)
        return [
            SampledToken(
                target.slot,
                target.position,
                draw.token_id,
                draw.logprobs,
                is_last=self._advance(target, draw.token_id),
                is_cut=target.slot in cut,
            )
            for target, draw in zip(targets, draws, strict=True)
        ]

    def _complete(self, logits_SV: Tensor, targets: list[Target], draws: list[Draw]) -> set[int]:
        """Take another token where an answer could not be completed in time after the sampled one.

        Returns:
            The slots of which `draws` was changed. What forbids the other token leaves the sampled.
        """
        cut: set[int] = set()
        if self._matchers is None:
            return cut
        for row, (target, draw) in enumerate(zip(targets, draws, strict=True)):
            if draw.error is not None:
                continue
            token_id = self._matchers.choose(target.slot, draw.token_id)
            if token_id == draw.token_id:
                continue
            mask = TokenMasks.only(token_id, logits_SV.shape[1])
            [other] = self._sample(logits_SV[row, None], [target], mask)
            if other.error is None:
                draws[row] = other
                cut.add(target.slot)
        return cut

    def _blame(self, target: Target, message: str, code: FaultCode) -> None:
        """End the target's sequence, though its slot may have another one by now."""
        if self._slots.holds(target):
            self._faults.add(target.slot, message, code)
        else:
            self._faults.tell(target.slot, message, code)

    def _masks(self, targets: list[Target]) -> TokenMasks | None:
        """What the grammars allow in the targets' places."""
        if self._matchers is None:
            return None
        masks, errors = self._matchers.masks([target.slot for target in targets])
        for slot, error in errors.items():
            self._faults.add(slot, _of_grammar(error), "constraint_failed")
        return masks

    def _advance(self, target: Target, token_id: int) -> bool:
        """Take a sampled token into its grammar; returns whether nothing may follow it."""
        if self._matchers is None or not self._slots.holds(target):
            return False
        if target.slot in self._faults:
            return False
        try:
            return self._matchers.advance(target.slot, token_id)
        except ValueError as error:
            self._faults.add(target.slot, _of_grammar(str(error)), "constraint_failed")
            return False

    def _sample(
        self, logits_SV: Tensor, targets: list[Target], masks: TokenMasks | None
    ) -> list[Draw]:
        """Sample all together, or one by one where that fails, to find out whose fault it is.

        A sequence at fault gets token 0, so that all ranks go on alike.
        """
        try:
            return sample(
                logits_SV,
                [self._slots[t.slot].sampling for t in targets],
                [t.position for t in targets],
                [TokenHistory(self._slots.prompt(t.slot), self._slots.output(t)) for t in targets],
                masks,
            )
        except Exception as error:
            if len(targets) == 1:
                with self._faults.blame([targets[0].slot], "sampling", is_local=True):
                    raise error
                return [Draw(0)]  # type: ignore[unreachable]
        alone = [None if masks is None else masks.of(row) for row in range(len(targets))]
        return [self._sample(logits_SV[i, None], [t], alone[i])[0] for i, t in enumerate(targets)]

    def score(
        self, plan: StepPlan, finals: dict[int, Tensor], decoded_TE: Tensor | None
    ) -> list[ScoredTokens]:
        """Log-probabilities of the known tokens that follow what a scoring sequence was fed."""
        scored: list[ScoredTokens] = []
        for group in ended(plan, self._decoder.stop_layer):
            for slot in group.slots:
                if self._slots[slot].score:
                    position = self._slots[slot].prompt_tokens
                    with self._faults.blame([slot], "scoring"):
                        scored.append(self._score(slot, position, finals[slot][None]))
        row = 0
        for item in plan.decode:
            if self._slots[item.slot].score:
                assert decoded_TE is not None
                hidden = decoded_TE[row : row + item.num_tokens]
                with self._faults.blame([item.slot], "scoring"):
                    scored.append(self._score(item.slot, item.position + 1, hidden))
            row += item.num_tokens
        return scored

    def score_prompts(self, whole: dict[int, Tensor]) -> list[PromptScores]:
        """Log-probabilities of the tokens of prompts, whose hidden states [n, E] are `whole`."""
        scored: list[PromptScores] = []
        for slot, hidden_NE in whole.items():
            num_top = self._slots[slot].sampling.num_prompt_logprobs or 0
            with self._faults.blame([slot], "scoring"):
                scores = self._scores(slot, 1, hidden_NE[:-1], num_top)
                scored.append(
                    PromptScores(
                        slot,
                        logprobs=scores.logprobs_M.numpy().tobytes(),
                        ranks=scores.ranks_M.numpy().tobytes(),
                        top_ids=scores.top_ids_MK.numpy().tobytes(),
                        top_logprobs=scores.top_logprobs_MK.numpy().tobytes(),
                    )
                )
        return scored

    def _score(self, slot: int, position: int, hidden_ME: Tensor) -> ScoredTokens:
        """Score the known tokens at `position` and after, predicted by `hidden_ME`."""
        num_top = self._slots[slot].sampling.num_logprobs or 0
        scores = self._scores(slot, position, hidden_ME, num_top)
        best = (
            (scores.top_ids_MK.tolist(), scores.top_logprobs_MK.tolist()) if num_top else ([], [])
        )
        return ScoredTokens(
            slot,
            position,
            tuple(scores.logprobs_M.tolist()),
            tuple(scores.ranks_M.tolist()),
            tuple(map(tuple, best[0])),
            tuple(map(tuple, best[1])),
        )

    def _scores(self, slot: int, position: int, hidden_ME: Tensor, num_top: int) -> "_Scores":
        """Scores of the known tokens at `position` and after, predicted by `hidden_ME`."""
        known = self._slots.tokens[slot, position : position + len(hidden_ME)]
        wanted_M1 = torch.from_numpy(known).to(hidden_ME.device).long()[:, None]
        scores = _Scores.empty(len(hidden_ME), min(num_top, self._decoder.spec.vocab_size))
        for chunk in chunks(len(hidden_ME), SCORE_CHUNK_TOKENS):
            logits = self._decoder.logits(hidden_ME[chunk])
            chosen = logits.gather(1, wanted_M1[chunk])
            total = logits.logsumexp(dim=-1, keepdim=True)
            if not total.isfinite().all():
                self._faults.add(slot, not_finite(position + chunk.start))
            scores.logprobs_M[chunk] = (chosen - total)[:, 0].cpu()
            scores.ranks_M[chunk] = (1 + (logits > chosen).sum(dim=-1)).int().cpu()
            if num_top:
                best = logits.topk(scores.top_ids_MK.shape[1], dim=-1)
                scores.top_ids_MK[chunk] = best.indices.int().cpu()
                scores.top_logprobs_MK[chunk] = (best.values - total).cpu()
        return scores


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a step samples.

    Attributes:
        tokens_S: where the model computes, int64; None where nothing is sampled.
        known: the tokens, or what waits for them.
        is_ready: whether they can be had without waiting.
        is_told: whether this rank is the one that tells the controller.
    """

    tokens_S: Tensor | None = None
    known: Sequence[SampledToken] | Callable[[], Sequence[SampledToken]] = ()
    is_ready: Callable[[], bool] = lambda: True
    is_told: bool = True

    def take(self) -> Sequence[SampledToken]:
        """The tokens, as soon as they are known."""
        return self.known() if callable(self.known) else self.known


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-probabilities (float32) and ranks (int32) of known tokens, and the K best beside them."""

    logprobs_M: Tensor
    ranks_M: Tensor
    top_ids_MK: Tensor
    top_logprobs_MK: Tensor

    @classmethod
    def empty(cls, num_tokens: int, num_top: int) -> "_Scores":
        """Room for the scores, on the host."""
        return cls(
            torch.empty(num_tokens),
            torch.empty(num_tokens, dtype=torch.int32),
            torch.empty(num_tokens, num_top, dtype=torch.int32),
            torch.empty(num_tokens, num_top),
        )


def _of_grammar(error: str) -> str:
    return f"structured_outputs: the answer cannot go on: {error}"


def _sampled_rows(
    plan: StepPlan, targets: list[Target], finals: dict[int, Tensor], decoded_TE: Tensor | None
) -> Tensor:
    """The hidden states [S, E] of the targets: first of ended prefills, then of decoded tokens."""
    parts = [finals[t.slot][None] for t in targets if t.slot in finals]
    if decoded_TE is not None:
        ends = _last_rows(plan)
        rows = [ends[t.slot] for t in targets if t.slot in ends]
        if rows == list(range(len(decoded_TE))):
            parts.append(decoded_TE)
        elif rows:
            chosen = to_device(np.array(rows, dtype=np.int64), decoded_TE.device)
            parts.append(decoded_TE.index_select(0, chosen))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _last_rows(plan: StepPlan) -> dict[int, int]:
    """Slot -> row of the last token that the plan's decode items feed."""
    rows: dict[int, int] = {}
    row = -1
    for item in plan.decode:
        row += item.num_tokens
        rows[item.slot] = row
    return rows
