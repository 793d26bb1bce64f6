"""The way in: from a request as somebody wrote it to tokens, checked against model and engine.

Nothing is queued here, so whatever is wrong with a request costs that request alone.
"""

import hashlib

from saqqara.cluster.request import Prompt, Request, check_room
from saqqara.cluster.sampling import SamplingParams, derived_seed, scoring_params
from saqqara.cluster.scheduling.sequence import TokenRequest
from saqqara.compression.retention import Retention
from saqqara.workers.plan import SamplingSpec

from .request_checks import RetentionLimits, check_priority, check_token_ids
from .tokenizer import Tokenizer


class Intake:
    """Reads the requests of one engine.

    Args:
        tokenizer: the model's.
        vocab_size: the model's tokens are below it.
        eos_token_ids: tokens that end a text.
        max_model_len: most tokens of a sequence, prompt and output together.
        retention: for requests that do not say.
        limits: what their retentions may ask for.
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
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_model_len = max_model_len
        self._own_retention = retention
        self._limits = limits
        self._seed = seed

    def read(self, request: Request, arrival_time: float) -> TokenRequest:
        """The request in tokens.

        Raises:
            ValueError: it cannot be served; names the field.
        """
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
        tokens = TokenRequest(
            request_id=request.request_id,
            prompt_token_ids=prompt_token_ids,
            sampling=sampling,
            retention=self._retention(request),
            priority=request.priority,
            score_continuation=scored,
            token_by_token=request.token_by_token,
            arrival_time=arrival_time,
            prompt=request.prompt if isinstance(request.prompt, str) else None,
        )
        if request.must_fit and scored is None:
            check_room(len(prompt_token_ids), sampling.max_tokens, self._max_model_len)
        check_priority(request.priority)
        return tokens

    def specs(self, request: TokenRequest) -> list[SamplingSpec]:
        """How each of its choices is sampled.

        Raises:
            ValueError: nothing could be sampled.
        """
        sampling = request.sampling
        seed = self._request_seed(request)
        bad_words = self._tokenizer.spellings(sampling.bad_words)
        return [
            sampling.spec(derived_seed(seed, choice=index), self._eos_token_ids, bad_words)
            for index in range(sampling.n)
        ]

    def _request_seed(self, request: TokenRequest) -> int:
        """The request's own seed, or one that the engine's seed and the request's id determine."""
        if request.sampling.seed is not None:
            return request.sampling.seed
        name = f"{self._seed}/{request.request_id}"
        return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())

    def _retention(self, request: Request) -> Retention:
        if request.retention is None and request.budget is None:
            return self._own_retention
        given = self._own_retention if request.retention is None else request.retention
        retention = Retention.parse(given, request.budget)
        self._limits.check(retention)
        return retention

    def _prompt_tokens(self, request: Request) -> tuple[int, ...]:
        if (request.prompt is None) == (request.messages is None):
            raise ValueError("give either prompt or messages")
        if request.prompt is not None:
            return self._tokens("prompt", request.prompt)
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
        return token_ids[-keep:]
