"""What stands between the HTTP API and the engine: prompts, limits, the queue, and streams."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from saqqara.cluster.chat import ChatOptions, num_characters
from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.streams import AsyncEngine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.live.snapshot import LiveStats
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.replies import check_served
from saqqara.cluster.openai.requests import (
    ChatRequest,
    CompletionRequest,
    check_model,
)
from saqqara.cluster.openai.shown import ANSWER_ONLY, Shown
from saqqara.cluster.openai.tools.reader import PLAIN, AnswerFormat
from saqqara.cluster.openai.tools.style import ChatStyle
from saqqara.cluster.outcome import check_room
from saqqara.cluster.request import Request, RequestOutput
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig, ServeConfig

from .admission import Admission
from .desk import Desk
from .io import merged

T = TypeVar("T")

_LEAST_SECONDS = 1e-6  # of a request whose time is over: the engine ends it at once
LONG_TEXT_CHARS = 8192  # a longer text is tokenised in a thread: it takes milliseconds
FORM_CHARS = 1_000_000  # what takes as long to tokenise as a grammar may take, or a template


@dataclass(frozen=True, slots=True)
class Caller:
    """Who waits for an answer: whose share of the queue it has, and until when it waits.

    `owner` is empty where nobody shares the queue; see `Admission`. `deadline` is in the time of
    the event loop; None: for ever.
    """

    owner: str = ""
    deadline: float | None = None


NOBODY = Caller()


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is checked and tokenised.

    `names` are what the client calls the engine's fields; `texts` what prompts were made of.
    `answers` says how the answers to a chat are read, and `visible_tokens` which special tokens
    that needs. `cache_salt` and `conversation_id` are those of a `Request`.
    """

    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[str | None, ...]
    names: Mapping[str, str]
    sampling: SamplingParams
    retention: Retention
    priority: int = 0
    caller: Caller = NOBODY
    shown: Shown = ANSWER_ONLY
    answers: AnswerFormat = PLAIN
    visible_tokens: tuple[str, ...] = ()
    cache_salt: str = ""
    conversation_id: str | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences that the engine runs for it."""
        return len(self.prompts) * self.sampling.n


class Generation:
    """Serves checked requests on one engine; used in one event loop.

    Args:
        config: the server's settings.
        engine_config: those of its engine.
        engine: the engine, from now on this object's.
        tokenizer: of the model, not the engine's own: the two are used at the same time.

    Attributes:
        admission: who may come in.
        tokenizer: as given.
        model: its name in answers.
        names: all names that requests may give.
        trusts_templates: whether clients may bring chat templates.
        shows_tokenizer: whether clients may read the tokenizer's settings.
        style: how the model writes thoughts and calls.
        parsing: where long bodies are read.
    """

    def __init__(
        self,
        config: ServeConfig,
        engine_config: EngineConfig,
        engine: Engine,
        tokenizer: Tokenizer,
    ) -> None:
        self.model = config.model_loading_config.model_id
        self.names = (self.model, *config.model_aliases)
        self.trusts_templates = config.trust_request_chat_template
        self.shows_tokenizer = config.enable_tokenizer_info_endpoint
        self._source = config.model_loading_config.model_source
        self.limits = config.limits
        self.tokenizer = tokenizer
        self.max_model_len = engine.scheduler.max_model_len
        self.max_num_seqs = engine.config.max_num_seqs
        self.admission = Admission(
            self.max_num_seqs,
            config.limits.max_queue,
            max_share=config.limits.max_queue_share,
        )
        self.style = ChatStyle.of(
            tokenizer.chat_template, engine_config.tool_call_parser, engine_config.reasoning_parser
        )
        self._retention = engine.retention
        self._vocab_size = engine.vocab_size
        self._metrics = engine.metrics
        self._live_stats = engine.live_stats
        self.parsing = Desk("parse", self.admission.capacity_of)
        self._desk = Desk("tokenize", self.admission.capacity_of)
        self._engine = AsyncEngine(engine)

    @property
    def engine(self) -> AsyncEngine:
        """The engine."""
        return self._engine

    @property
    def retention(self) -> Retention:
        """What is kept for requests that do not say."""
        return self._retention

    def metrics(self) -> str:
        """The engine's metrics in the Prometheus text format."""
        return self._metrics.render()

    def live_stats(self) -> LiveStats:
        """What the engine does now."""
        return self._live_stats()

    async def shutdown(self) -> None:
        """End the engine; whoever still waits for it gets an error."""
        self.admission.close()
        await asyncio.to_thread(self._engine.shutdown)
        self._desk.close()
        self.parsing.close()

    def admit(self, job: Job) -> AbstractContextManager[None]:
        """Hold room for a job; see `Admission.enter`."""
        return self.admission.enter(job.num_sequences, job.caller.owner)

    async def prepare(
        self,
        request: CompletionRequest | ChatRequest,
        caller: Caller = NOBODY,
    ) -> Job:
        """Check and tokenise a request.

        Args:
            request: as the client wrote it.
            caller: who waits for it.

        Raises:
            ApiError: what is wrong with it, and in which field.
        """
        self.check_model(request.model)
        request.check_limits(self.limits)
        request.check_profile()
        cost = 0 if request.structure is None else FORM_CHARS
        sampling = await self._off_loop_if_long(caller.owner, cost, request.sampling_params)
        retention = request.read_retention(self._retention)
        texts: list[str | None] = [None]
        answers = PLAIN
        visible: tuple[str, ...] = ()
        if isinstance(request, ChatRequest):
            self._check_tools(request)
            options = request.chat_options(trusts_templates=self.trusts_templates)
            encoded = await self.encode_chat(request.messages, options, caller.owner)
            prompts = [self._fitting("messages", encoded)]
            answers = self.style.answer_format(
                request.tool_use,
                prompt_end=self.tokenizer.end_of_text(encoded),
                is_held=request.structure is not None,
                shows_thoughts=request.include_reasoning is not False,
            )
            visible = self.style.markers(request.tool_use)
        else:
            given = request.prompts(self.limits.max_prompts)
            adds = request.add_special_tokens is not False
            prompts = [await self._encode(p, caller.owner, add_special_tokens=adds) for p in given]
            texts = [prompt if isinstance(prompt, str) else None for prompt in given]
        job = Job(
            tuple(map(tuple, prompts)),
            tuple(texts),
            request.names,
            sampling,
            retention,
            request.priority or 0,
            caller,
            request.shown,
            answers,
            visible,
            request.cache_salt or "",
            request.conversation_id,
        )
        self._check_lengths(job)
        self._check_logprobs(job)
        if job.num_sequences > self.admission.capacity_of(caller.owner):
            raise ApiError(
                400,
                f"n: {len(prompts)} prompts times n={sampling.n} are more sequences than the "
                f"{self.admission.capacity_of(caller.owner)} that the server takes at once",
                "n",
                "limit_exceeded",
            )
        return job

    async def outputs(
        self, job: Job, *, stream: bool
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(Place of the prompt, its output so far); without `stream` finished outputs only.

        Leaving the iteration aborts what is not finished.

        Raises:
            ApiError: the engine does not take the request.
            EngineDeadError: the engine has failed.
        """
        places = range(len(job.prompts))
        sources = [self._serve(job, place, stream) for place in places]
        if len(sources) == 1:
            async with aclosing(sources[0]) as source:
                async for output in source:
                    yield 0, output
            return
        async with aclosing(merged(sources)) as both:
            async for item in both:
                yield item

    async def encode_text(
        self, text: str, owner: str = "", *, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a text; `owner` is who asks, as in `Caller`."""

        def encode() -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens)

        return await self._off_loop_if_long(owner, len(text), encode)

    async def decode(self, token_ids: Sequence[int], owner: str = "") -> str:
        """The text of token ids, special ones by their names."""

        def decode() -> str:
            return self.tokenizer.decode(token_ids, skip_special_tokens=False)

        return await self._off_loop_if_long(owner, len(token_ids), decode)

    async def token_strings(self, token_ids: Sequence[int], owner: str = "") -> list[str]:
        """Tokens as the vocabulary spells them."""

        def spell() -> list[str]:
            return self.tokenizer.token_strings(token_ids)

        return await self._off_loop_if_long(owner, len(token_ids), spell)

    async def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions, owner: str = ""
    ) -> list[int]:
        """Token ids of a conversation.

        Raises:
            ApiError: a message is wrong; names its field.
        """

        def encode() -> list[int]:
            return self.tokenizer.apply_chat(messages, options)

        try:
            num_chars = num_characters([*messages, *options.tools, options.template_args])
            if options.chat_template is not None:  # a client's may run as long as it can
                num_chars += FORM_CHARS
            return await self._off_loop_if_long(owner, num_chars, encode)
        except ValueError as error:
            raise ApiError.of(error, "messages") from None

    def check_model(self, model: str | None) -> None:
        """Raise an `ApiError` (404) unless this is the model that the server has.

        What was given as `--model` names it, too, as in vLLM; errors do not tell where it lies.
        """
        if model != self._source:
            check_model(model, self.names)

    def _check_tools(self, request: ChatRequest) -> None:
        try:
            self.style.check(request.tool_use)
        except ValueError as error:
            raise ApiError.of(error) from None

    async def _encode(
        self, prompt: str | list[int], owner: str, *, add_special_tokens: bool
    ) -> list[int]:
        if isinstance(prompt, str):
            ids = await self.encode_text(prompt, owner, add_special_tokens=add_special_tokens)
            return self._fitting("prompt", ids)
        return prompt  # the engine checks what did not come from the tokenizer

    def _fitting(self, field: str, token_ids: list[int]) -> list[int]:
        try:
            return self.tokenizer.check_fit(field, token_ids, self._vocab_size)
        except ValueError as error:
            raise ApiError.of(error, field) from None

    async def _off_loop_if_long(self, owner: str, num_chars: int, function: Callable[[], T]) -> T:
        if num_chars <= LONG_TEXT_CHARS:
            return function()
        return await self._desk.run(owner, num_chars, function)

    def _check_logprobs(self, job: Job) -> None:
        """Raise an `ApiError` where the answer could have more than this server gives."""
        sampling, most = job.sampling, 0
        for prompt in job.prompts:
            if sampling.logprobs is not None:
                room = self.max_model_len - len(prompt)
                num_new = room if sampling.max_tokens is None else min(sampling.max_tokens, room)
                most += sampling.n * num_new * (1 + sampling.logprobs)
            if sampling.prompt_logprobs is not None:
                most += len(prompt) * (1 + sampling.prompt_logprobs)
        limit = self.limits.max_answer_logprobs
        if most > limit:
            of_prompt = sampling.logprobs is None
            field = "prompt_logprobs" if of_prompt else job.names["logprobs"]
            raise ApiError(
                400,
                f"{field}: the answer could have {most} log-probabilities, and this server gives "
                f"{limit} at most; ask for fewer of them, or fewer tokens or choices",
                field,
                "limit_exceeded",
            )

    def _check_lengths(self, job: Job) -> None:
        """Raise an `ApiError` for what has no room, before it waits in the queue."""
        if job.sampling.truncate_prompt_tokens is not None:
            return
        try:
            for prompt in job.prompts:
                check_room(len(prompt), job.sampling.max_tokens, self.max_model_len)
        except ValueError as error:
            raise ApiError.of(error).renamed(job.names) from None

    async def _serve(
        self, job: Job, place: int, stream: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        request = Request(
            secrets.token_hex(12),
            job.prompts[place],
            job.sampling.for_prompt(place),
            retention=job.retention,
            priority=job.priority,
            owner=job.caller.owner,
            cache_salt=job.cache_salt,
            conversation_id=job.conversation_id,
            timeout_seconds=_seconds_until(job.caller.deadline),
            stream=stream,
            prompt_text=job.texts[place] if job.shown.echo else None,
            echo=job.shown.echo,
            must_fit=True,
            visible_tokens=job.visible_tokens,
        )
        source = self._engine.generate(request)
        try:
            async with aclosing(source) as outputs:
                async for output in outputs:
                    check_served(output)
                    yield output
        except ApiError as error:
            raise error.renamed(job.names) from None
        except ValueError as error:
            raise ApiError.of(error, "prompt").renamed(job.names) from None


def _seconds_until(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    return max(deadline - asyncio.get_running_loop().time(), _LEAST_SECONDS)
