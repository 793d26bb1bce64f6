"""What the scheduler knows about a request and its choices. Plain values, no tensors."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from saqqara.cluster.outcome import ErrorCode, FinishReason, KVUsage
from saqqara.cluster.reuse.conversations import Key as Conversation
from saqqara.cluster.reuse.prefixes import NOTHING, Found
from saqqara.cluster.reuse.turns import Resumption
from saqqara.compression.retention import Retention
from saqqara.workers.plan import CachedPrefix, NewSequence, PromptScores, SamplingSpec

Key = tuple[int, int, int]


class OutputEnd(Protocol):
    """What ends an output; `SamplingParams` says it, and much that is no matter of scheduling."""

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of the output; None: as many as there is room for."""

    @property
    def min_tokens(self) -> int:
        """So many come before a token may end it."""

    @property
    def stop_token_ids(self) -> Collection[int]:
        """Tokens that end it."""

    @property
    def ignore_eos(self) -> bool:
        """Whether the model's own tokens do not end it."""


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A request in tokens, as the engine has checked it: tokenised, truncated, nothing left open.

    With `score_continuation` its tokens are scored after the prompt and nothing is generated;
    `token_by_token` feeds them in the decode steps that generating them would take. Of `sampling`
    only what ends the output matters here. `prompt` is the text, if there was one.
    A lower `priority` goes first; among equal ones owners have their turns, and those of one owner
    go in order of arrival. `visible_token_ids` are the special tokens that stay in the answer's
    text. Prefixes are shared among requests of one owner with one `cache_salt`. With a
    `conversation_id`, which is the owner's, what it keeps stays for the next turn.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: OutputEnd
    retention: Retention
    priority: int = 0
    score_continuation: tuple[int, ...] | None = None
    token_by_token: bool = False
    arrival_time: float = 0.0
    prompt: str | None = None
    owner: str = ""
    visible_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    conversation_id: str | None = None

    @property
    def is_score(self) -> bool:
        """Whether it scores a continuation instead of generating one."""
        return self.score_continuation is not None


class Status(Enum):
    """Where a sequence stands: before the queue, in it, in a prefill group, decoding, or done."""

    PREPARING = "preparing"
    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request while the scheduler has it.

    `position` is logical: how many of the sequence's tokens have been fed (or are planned to be);
    what the rows still keep of them is the ledger's business. `num_in_flight` counts the plans
    that mention the sequence and are not absorbed yet, `num_sampling` those of them that sample it.
    `prompt_tokens` is the prompt's length; with `is_score` a continuation is scored and nothing is
    generated.
    """

    request: TokenRequest
    index: int
    arrival: int
    spec: SamplingSpec
    stop_token_ids: frozenset[int]
    eos_token_ids: frozenset[int]
    max_output_tokens: int

    turn: int | None = None  # among the owners of its priority, in tokens; from when it first waits
    status: Status = Status.WAITING
    slot: int | None = None
    position: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    scored_logprobs: list[float] = field(default_factory=list)
    scored_ranks: list[int] = field(default_factory=list)
    scored_top: list[dict[int, float]] = field(default_factory=list)
    num_in_flight: int = 0
    num_sampling: int = 0
    num_preemptions: int = 0
    num_refusals: int = 0
    is_cut: bool = False  # tokens were chosen so that the answer is complete within max_tokens
    reuses_prefix: bool = True  # where its retention allows
    num_stored_tokens: int = 0  # of its prompt, that its first prefill left in blocks
    block_keys: tuple[bytes, ...] = ()  # of its prompt; none where it uses no blocks
    found: Found = NOTHING  # of them, when it was last looked for while it waits
    parked_id: int | None = None  # of its rows, while it waits and they are kept
    resumed_id: int | None = None  # that its rows came back from
    resumption: Resumption | None = None  # of its conversation, while it has a slot by it
    left_id: int | None = None  # of what it has left to the next turn of its conversation
    num_cached_tokens: int = 0  # of its prompt, that were not computed when it first had a slot
    discarding: bool = False  # a worker refused it: what is still in flight of it is void
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_code: ErrorCode | None = None
    prompt_scores: PromptScores | None = None
    kv_cache: KVUsage | None = None  # once it has finished, if it was prefilled then
    prompt_hash: int = field(init=False)
    prompt_tokens: int = field(init=False)
    is_score: bool = field(init=False)
    _prompt_array: NDArray[np.int32] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.prompt_hash = hash(self.request.prompt_token_ids)
        self.prompt_tokens = len(self.request.prompt_token_ids)
        self.is_score = self.request.is_score

    @property
    def held_slot(self) -> int:
        """Its slot, where it must have one."""
        assert self.slot is not None, "a sequence without a slot"
        return self.slot

    @property
    def key(self) -> Key:
        """Order of service: lower goes first and is preempted last."""
        return (self.request.priority, self.turn or 0, self.arrival)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status is Status.FINISHED

    def is_ended_by(self, token_id: int) -> bool:
        """Whether its last token, this one, ends the text and is no part of it."""
        is_end = token_id in self.eos_token_ids or token_id in self.stop_token_ids
        return self.finish_reason == "stop" and is_end

    @property
    def conversation(self) -> Conversation | None:
        """The conversation whose turn it is; see `TokenRequest`."""
        name = self.request.conversation_id
        return None if name is None else (self.request.owner, name)

    @property
    def resumed_tokens(self) -> int:
        """Tokens of its prompt that its conversation has, so that they are not computed."""
        return 0 if self.resumption is None else self.resumption.num_tokens

    @property
    def scores_prompt(self) -> bool:
        """Whether its prefill is to give its prompt's tokens log-probabilities."""
        return self.spec.num_prompt_logprobs is not None and self.prompt_scores is None

    @property
    def known_after_prompt(self) -> tuple[int, ...] | list[int]:
        """Tokens known to follow the prompt: the continuation, or those generated."""
        continuation = self.request.score_continuation
        return self.output_token_ids if continuation is None else continuation

    @property
    def num_replay(self) -> int:
        """Tokens after the prompt that must be fed after a prefill before anything new is."""
        continuation = self.request.score_continuation
        if continuation is None:
            return len(self.output_token_ids)
        return len(continuation) - 1  # nothing follows a scored last token

    @property
    def num_to_feed(self) -> int:
        """Tokens from `position` on that exist once the plans in flight have run."""
        return self.prompt_tokens + self.num_replay + self.num_sampling - self.position

    @property
    def wants_sample(self) -> bool:
        """Whether another token may be sampled beyond those in flight."""
        room = self.max_output_tokens - len(self.output_token_ids) - self.num_sampling
        return not self.is_score and room > 0

    def can_share_prefill(self, other: "Sequence") -> bool:
        """Whether prefill computes the same for both, however each of them is retained then.

        Owners do not share, so that none can tell what another one asks.
        """
        ours, theirs = self.request, other.request
        if ours.conversation_id is not None or theirs.conversation_id is not None:
            return False  # it may go on from what its rows hold
        if (ours.owner, ours.cache_salt) != (theirs.owner, theirs.cache_salt):
            return False
        if ours.prompt_token_ids is not theirs.prompt_token_ids and (
            self.prompt_hash != other.prompt_hash
            or ours.prompt_token_ids != theirs.prompt_token_ids
        ):
            return False
        return ours.retention.propagate == theirs.retention.propagate

    @property
    def prompt_array(self) -> NDArray[np.int32]:
        """The prompt's tokens, int32 [n]; whoever waits for a slot is asked in each plan."""
        if self._prompt_array is None:
            self._prompt_array = np.asarray(self.request.prompt_token_ids, dtype=np.int32)
        return self._prompt_array

    def new_sequence(
        self,
        shares_prefill_with: int | None = None,
        prefix: CachedPrefix | None = None,
        resumes: int | None = None,
    ) -> NewSequence:
        """What the workers are told when it takes its slot; `resumes` is what it goes on from."""
        resumed_tokens = self.position
        if resumes is None:
            resumed_tokens = self.resumed_tokens
            resumes = None if self.resumption is None else self.resumption.kept.parked_id
        tokens = (*self.request.prompt_token_ids, *self.known_after_prompt)
        spec = self.spec
        if self.prompt_scores is not None:  # they are known since an earlier prefill
            spec = replace(spec, num_prompt_logprobs=None)
        return NewSequence(
            slot=self.held_slot,
            token_ids=np.asarray(tokens, dtype=np.int32).tobytes(),
            prompt_tokens=self.prompt_tokens,
            sampling=spec,
            retention=self.request.retention,
            score=self.is_score,
            shares_prefill_with=shares_prefill_with,
            prefix=prefix,
            resumes=resumes,
            resumed_tokens=resumed_tokens,
        )
