"""The way in: from a request as somebody wrote it to tokens, checked against model and engine.

Nothing is queued here, so whatever is wrong with a request costs that request alone.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from saqqara.cluster.outcome import check_room
from saqqara.cluster.presets import ModelPresets
from saqqara.cluster.request import Prompt, Request, check_reuse
from saqqara.cluster.sampling import SamplingParams, derived_seed, scoring_params
from saqqara.cluster.scheduling.sequence import TokenRequest
from saqqara.compression.growth import num_ring_queries
from saqqara.compression.layers import Layers
from saqqara.compression.retention import Retention
from saqqara.configs.schema import MAX_TIMEOUT_SECONDS
from saqqara.configs.shown import shown
from saqqara.workers.models.spec import ModelSpec
from saqqara.workers.plan import SamplingSpec, WorkerInfo

from .tokenizer import Tokenizer

MAX_PRIORITY = 2**31 - 1
_DTYPE_BYTES = {"float32": 4}  # else 2
_MIN_RING_QUERIES = 64  # remembered whatever the pool: all presets need at most half of them


@dataclass(frozen=True, slots=True)
class RetentionLimits:
    """What retentions may ask of one engine.

    Attributes:
        layers: of the model.
        num_query_heads: of each of its layers.
        num_kv_heads: of each of its layers.
        max_ring_queries: of one sequence that a worker may remember while it decodes.
    """

    layers: Layers
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

        Raises:
            ValueError: the model cannot have `own`.
        """
        most = min(_share_in_queries(worker, spec, max_num_seqs) for worker in workers)
        most = max(most, num_ring_queries(own), _MIN_RING_QUERIES)
        limits = cls(spec.layers, spec.num_query_heads, spec.num_kv_heads, most)
        limits.check(own)
        return limits

    def check(self, retention: Retention) -> None:
        """Raise a ValueError that names the setting which this engine cannot meet."""
        try:
            self._check(retention)
        except ValueError as error:
            raise ValueError(f"retention: {error}") from None

    def check_propagates(self, retention: Retention) -> None:
        """Raise a ValueError where it propagates, and the model has layers with a window."""
        if self.layers.local_layers:
            try:
                retention.entering_tokens(1, self.layers)
            except ValueError as error:
                raise ValueError(f"retention: {error}") from None

    def _check(self, retention: Retention) -> None:
        retention.entering_tokens(1, self.layers)
        retention.row_tokens(1, self.layers, self.num_kv_heads)
        if retention.profile is not None:
            retention.profile.check(len(self.layers), self.num_query_heads)
        if num_ring_queries(retention) > self.max_ring_queries:
            raise ValueError(
                f"window: with decode, workers remember the queries of the last {retention.window} "
                f"tokens; they have room for {self.max_ring_queries} per sequence (the share of "
                "one in max_num_seqs of the KV pool)"
            )


def sampling_of(request: TokenRequest) -> SamplingParams:
    """All that a request says of sampling; the scheduler knows what ends its output alone."""
    assert isinstance(request.sampling, SamplingParams), "the intake put another value there"
    return request.sampling


class Intake:
    """Reads the requests of one engine.

    Args:
        tokenizer: the model's.
        vocab_size: the model's tokens are below it.
        eos_token_ids: tokens that end a text.
        max_model_len: most tokens of a sequence, prompt and output together.
        retention: for requests that do not say.
        limits: what their retentions may ask for.
        presets: fill in what their retentions leave to a profile of the model.
        seed: seeds the requests that bring no seed of their own.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        retention: Retention,
        limits: RetentionLimits,
        presets: ModelPresets,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._own_retention = retention
        self._limits = limits
        self._presets = presets
        self._seed = seed

    def read(self, request: Request) -> TokenRequest:
        """The request in tokens.

        Raises:
            ValueError: it cannot be served; names the field.
        """
        check_reuse(request)
        continuation = request.score_continuation
        if continuation is None:
            sampling = request.sampling_params
            sampling.check_vocabulary(self._vocab_size)
            scored = None
            prompt_token_ids = self._truncate(self._prompt_tokens(request), sampling)
        else:
            scored = self._tokens("score_continuation", continuation, add_special_tokens=False)
            sampling = scoring_params(request.sampling_params.logprobs)
            prompt_token_ids = self._prompt_tokens(request)
        retention = self._retention(request)
        if sampling.prompt_logprobs is not None and retention.propagate is not None:
            raise ValueError(
                "prompt_logprobs: with a retention that propagates, most tokens of the prompt do "
                "not reach the last layer, which says how likely they are; choose another retention"
            )
        tokens = TokenRequest(
            request_id=request.request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            retention=retention,
            priority=request.priority,
            owner=request.owner,
            cache_salt=request.cache_salt,
            conversation_id=request.conversation_id,
            score_continuation=scored,
            token_by_token=request.token_by_token,
            prompt=self._text(request, prompt_token_ids),
            visible_token_ids=self._tokenizer.special_ids(request.visible_tokens),
        )
        if request.must_fit and scored is None:
            check_room(len(prompt_token_ids), sampling.max_tokens, self._max_model_len)
        check_priority(request.priority)
        check_timeout(request.timeout_seconds)
        return tokens

    def specs(self, request: TokenRequest) -> list[SamplingSpec]:
        """How each of its choices is sampled.

        Raises:
            ValueError: nothing could be sampled.
        """
        sampling = sampling_of(request)
        seed = self._request_seed(request)
        bad_words = self._tokenizer.spellings(sampling.bad_words)
        within = self._complete_within(sampling, len(request.prompt_token_ids))
        specs = [
            sampling.spec(derived_seed(seed, choice=index), self._eos_token_ids, bad_words)
            for index in range(sampling.n)
        ]
        specs = [replace(spec, complete_within=within) for spec in specs]
        # The choices have one prompt; its log-probabilities come with the first of them.
        return [specs[0], *(replace(spec, num_prompt_logprobs=None) for spec in specs[1:])]

    def _complete_within(self, sampling: SamplingParams, num_prompt_tokens: int) -> int | None:
        """Tokens within which the answer is to be complete; None: it need not be."""
        form = sampling.structured_outputs
        if form is None or sampling.ignore_eos or not form.complete_within_max_tokens:
            return None
        room = self._max_model_len - num_prompt_tokens
        return room if sampling.max_tokens is None else min(room, sampling.max_tokens)

    def _request_seed(self, request: TokenRequest) -> int:
        """The request's own seed, or one that the engine's seed and the request's id determine."""
        seed = sampling_of(request).seed
        if seed is not None:
            return seed
        name = f"{self._seed}/{request.request_id}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())

    def _text(self, request: Request, token_ids: tuple[int, ...]) -> str | None:
        """The text of a prompt, if there was one or it is wanted."""
        text = request.prompt if isinstance(request.prompt, str) else request.prompt_text
        is_cut = request.sampling_params.truncate_prompt_tokens is not None
        if request.echo and (text is None or is_cut):
            skips = request.sampling_params.skip_special_tokens
            return self._tokenizer.decode(token_ids, skip_special_tokens=skips)
        return text

    def _retention(self, request: Request) -> Retention:
        if request.retention is None and request.budget is None:
            return self._own_retention
        given = self._own_retention if request.retention is None else request.retention
        retention = Retention.parse(given, request.budget)
        self._limits.check_propagates(retention)
        try:
            retention = self._presets.resolve(retention)
        except ValueError as error:
            raise ValueError(f"retention: {error}") from None
        self._limits.check(retention)
        return retention

    def _prompt_tokens(self, request: Request) -> tuple[int, ...]:
        if (request.prompt is None) == (request.messages is None):
            raise ValueError("give either prompt or messages")
        if request.prompt is not None:
            return self._tokens(
                "prompt", request.prompt, add_special_tokens=request.add_special_tokens
            )
        assert request.messages is not None
        ids = self._tokenizer.apply_chat(request.messages, request.chat_options)
        return tuple(self._tokenizer.check_fit("messages", ids, self._vocab_size))

    def _tokens(
        self, field: str, given: Prompt, *, add_special_tokens: bool = True
    ) -> tuple[int, ...]:
        """Tokens of a text, or those that were given, if the model has all of them."""
        if isinstance(given, str):
            ids = self._tokenizer.encode(given, add_special_tokens)
            return tuple(self._tokenizer.check_fit(field, ids, self._vocab_size))
        check_token_ids(field, given, self._vocab_size)
        return tuple(given)

    def _truncate(self, token_ids: tuple[int, ...], sampling: SamplingParams) -> tuple[int, ...]:
        keep = sampling.truncate_prompt_tokens
        if keep is None:
            return token_ids
        if keep == -1:
            max_tokens = sampling.max_tokens or 1
            keep = self._max_model_len - max_tokens
            if keep < 1:
                raise ValueError(
                    f"truncate_prompt_tokens=-1 leaves nothing of the prompt: max_tokens="
                    f"{max_tokens} fills max_model_len={self._max_model_len}"
                )
        return token_ids[-keep:] if sampling.truncation_side == "left" else token_ids[:keep]


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


def check_timeout(seconds: object) -> None:
    """Raise a ValueError unless it is None or a time that a request may be given."""
    if seconds is None:
        return
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds <= MAX_TIMEOUT_SECONDS:  # type: ignore[operator]
        raise ValueError(
            f"timeout_seconds: must be a number above 0 and at most {MAX_TIMEOUT_SECONDS:.0f}, "
            f"not {shown(seconds)}"
        )


def _share_in_queries(worker: WorkerInfo, spec: ModelSpec, max_num_seqs: int) -> int:
    """How many tokens' queries take as many bytes as one sequence's share of a worker's pages."""
    rows = (worker.stop_layer - worker.start_layer) * (worker.stop_head - worker.start_head)
    query_bytes = rows * spec.group_size * spec.head_dim * _DTYPE_BYTES.get(worker.dtype, 2)
    return worker.num_pages * worker.page_bytes // (max_num_seqs * query_bytes)
