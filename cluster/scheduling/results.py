"""A step that has come back: what its results change, one kind after the other."""

from collections.abc import Sequence as Many

from saqqara.workers.plan import SampledToken, ScoredTokens, StepResult

from .draft import Draft
from .events import NewScores, NewToken, Prefilled
from .roster import Roster
from .sequence import Sequence, Status

CUT = "max_tokens"  # the stop reason of an answer that was completed because its tokens ran out


class Landing:
    """Takes in the results of one plan; the methods are called in the order they stand in.

    What a worker refused is void, and so is whatever later plans in flight say of the same
    sequence: it is `discarding` until the last of them has landed.

    Args:
        roster: the sequences.
        draft: the plan that was carried out.
        results: one per worker.
    """

    def __init__(self, roster: Roster, draft: Draft, results: Many[StepResult]) -> None:
        self._roster = roster
        self._draft = draft
        self._results = results
        self._refused: list[int] = []  # slots

    def note_pages(self) -> None:
        """Bring the ledger up to date; tells of prompts all of whose rows are known now."""
        ledger = self._roster.ledger
        self._refused, prefilled = self._roster.seats.note(self._draft.sequences, self._results)
        for sequence in prefilled:
            if not _is_void(sequence):
                kept = ledger.kept_of_prompt(sequence.held_slot)
                self._roster.events.append(Prefilled(sequence, kept))

    def settle_blocks(self) -> None:
        """What prefills stored can be used from now on, unless a worker refused them."""
        cached, draft = self._roster.seats.cached, self._draft
        for slot in self._refused:
            if slot in draft.prefilling:
                cached.doom(draft.prefilling[slot])
        for slot in draft.through:
            cached.settle(draft.prefilling[slot])

    def count_down(self) -> None:
        """The plan is no longer in flight."""
        for sequence in self._draft.sequences.values():
            sequence.num_in_flight -= 1
        for slot in self._draft.sampling:
            self._draft.sequences[slot].num_sampling -= 1

    def end_faulty(self) -> None:
        """End the sequences whose numbers are broken."""
        for fault in (fault for result in self._results for fault in result.faults):
            sequence = self._draft.sequences[fault.slot]
            if not sequence.discarding:  # else it starts anew, and this was of its last try
                self._roster.finish(sequence, "error", error=fault.message, error_code=fault.code)

    def retry_refused(self) -> None:
        """Let sequences that a worker had no pages for try again."""
        for slot in self._refused:
            sequence = self._draft.sequences[slot]
            if sequence.resumption is not None:
                self._roster.seats.turns.drop(sequence.resumption)
            self._refuse(self._draft.sequences[slot], alone=self._draft.has_pool_alone)

    def take_prompts(self) -> None:
        """Note the scores of prompts."""
        for scores in (scores for result in self._results for scores in result.prompts):
            sequence = self._draft.sequences[scores.slot]
            if scores.slot not in self._refused and not _is_void(sequence):
                sequence.prompt_scores = scores

    def take_tokens(self) -> None:
        """Append the sampled tokens, and end what they end."""
        sampled = {token.slot: token for result in self._results for token in result.sampled}
        sequences, events = self._draft.sequences, self._roster.events
        for slot in self._draft.sampling:
            sequence = sequences[slot]
            if slot in self._refused or _is_void(sequence):
                continue
            token = sampled[slot]
            expected = sequence.prompt_tokens + len(sequence.output_token_ids)
            assert token.position == expected, f"token {token} should be at {expected}"
            sequence.output_token_ids.append(token.token_id)
            sequence.is_cut |= token.is_cut
            events.append(NewToken(sequence, token.token_id, token.logprobs))
            self._check_stop(sequence, token)

    def take_scores(self) -> None:
        """Note the scores of continuations, and end those that are through."""
        for scored in (scored for result in self._results for scored in result.scored):
            sequence = self._draft.sequences[scored.slot]
            if scored.slot not in self._refused and not _is_void(sequence):
                self._take_scores(sequence, scored)

    def settle_refused(self) -> None:
        """Sequences that wait, and of which nothing is in flight, start anew: nothing is void."""
        for sequence in self._draft.sequences.values():
            if sequence.num_in_flight == 0 and sequence.status is Status.WAITING:
                sequence.discarding = False

    def _refuse(self, sequence: Sequence, *, alone: bool) -> None:
        """Let a sequence that a worker had no pages for try again, unless it had all of them.

        One that came back from where it was parked tries again in any case: a worker may have lost
        what was parked, and has pages.
        """
        came_back = sequence.resumption is not None or sequence.resumed_id is not None
        self._roster.seats.forget_resumed(sequence)
        self._roster.seats.forget_left(sequence)
        if sequence.is_finished or sequence.discarding:
            return
        sequence.num_refusals += 1
        self._roster.drop_parked(sequence)
        if alone and not came_back:
            fed = max(sequence.position - sequence.prompt_tokens, 0)
            need = self._roster.seats.need(sequence, fed)
            self._roster.finish(sequence, "error", error=self._roster.seats.too_large(need))
            return
        sequence.discarding = True
        if sequence.status is Status.RUNNING:
            self._roster.requeue(sequence)

    def _check_stop(self, sequence: Sequence, token: SampledToken) -> None:
        token_id, num_tokens = token.token_id, len(sequence.output_token_ids)
        may_stop = num_tokens > sequence.request.sampling.min_tokens
        cut = CUT if sequence.is_cut else None
        if may_stop and token_id in sequence.eos_token_ids:
            self._roster.finish(sequence, "stop", stop_reason=cut)
        elif may_stop and token_id in sequence.stop_token_ids:
            self._roster.finish(sequence, "stop", stop_reason=token_id)
        elif token.is_last:  # whatever min_tokens says: there is nothing else to write
            self._roster.finish(sequence, "stop", stop_reason=cut)
        elif num_tokens >= sequence.max_output_tokens:
            self._roster.finish(sequence, "length")

    def _take_scores(self, sequence: Sequence, scored: ScoredTokens) -> None:
        # A preempted sequence is scored again from the start, with the same numbers.
        offset = scored.position - sequence.prompt_tokens
        assert 0 <= offset <= len(sequence.scored_logprobs), f"a gap before {scored}"
        known = len(sequence.scored_logprobs)
        place = slice(offset, offset + len(scored.logprobs))
        sequence.scored_logprobs[place] = scored.logprobs
        sequence.scored_ranks[place] = scored.ranks
        best = zip(scored.top_ids, scored.top_logprobs, strict=True)
        sequence.scored_top[place] = [dict(zip(*pair, strict=True)) for pair in best]
        num_new = len(sequence.scored_logprobs) - known
        self._roster.events.append(NewScores(sequence, num_new))
        if len(sequence.scored_logprobs) == len(sequence.known_after_prompt):
            self._roster.finish(sequence, "stop")


def _is_void(sequence: Sequence) -> bool:
    """Whether nothing that a step says of it counts any more."""
    return sequence.is_finished or sequence.discarding
