"""What stands between the HTTP API and the engine: prompts, limits, the queue, and streams."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig, ServeConfig

from .admission import Admission
from .async_engine import AsyncEngine
from .engine import Engine
from .openai_api import ApiError, ChatRequest, CompletionRequest, GenerationRequest
from .request import RequestOutput, SamplingParams
from .tokenizer import Tokenizer

T = TypeVar("T")

LONG_TEXT_CHARS = 8192  # a longer text is tokenised in a thread: it takes milliseconds


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is checked and tokenised.

    `field` is where its prompts came from.
    """

    prompts: tuple[tuple[int, ...], ...]
    field: str
    sampling: SamplingParams
    retention: Retention

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
    """

    def __init__(
        self,
        config: ServeConfig,
        engine_config: EngineConfig,
        engine: Engine,
        tokenizer: Tokenizer,
    ) -> None:
        self.model = config.model_loading_config.model_id
        self.limits = config.limits
        self.tokenizer = tokenizer
        self.max_model_len = engine.scheduler.max_model_len
        self.admission = Admission(engine_config.max_num_seqs, config.limits.max_queue)
        self._retention = engine.retention
        self._check_retention = engine.check_retention
        self._metrics = engine.metrics
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._engine = AsyncEngine(engine)

    @property
    def engine(self) -> AsyncEngine:
        """The engine."""
        return self._engine

    def metrics(self) -> str:
        """The engine's metrics in the Prometheus text format."""
        return self._metrics.render()

    async def shutdown(self) -> None:
        """End the engine; whoever still waits for it gets an error."""
        self.admission.close()
        await asyncio.to_thread(self._engine.shutdown)
        self._threads.shutdown(wait=False)

    async def prepare(self, request: CompletionRequest | ChatRequest) -> Job:
        """Check and tokenise a request.

        Raises:
            ApiError: what is wrong with it, and in which field.
        """
        self.check_model(request.model)
        request.check_limits(self.limits)
        sampling = request.sampling_params()
        retention = self._read_retention(request)
        if isinstance(request, ChatRequest):
            field = "messages"
            prompts = [await self.encode_chat(request.messages)]
        else:
            field = "prompt"
            prompts = [await self._encode(p) for p in request.prompts(self.limits.max_prompts)]
        max_tokens_field, _ = request.max_new_tokens
        for prompt in prompts:
            self._check_length(prompt, field, sampling, max_tokens_field)
        job = Job(tuple(map(tuple, prompts)), field, sampling, retention)
        if job.num_sequences > self.admission.capacity:
            raise ApiError(
                400,
                f"n: {len(prompts)} prompts times n={sampling.n} are more sequences than the "
                f"{self.admission.capacity} that the server takes at once",
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
        async with aclosing(_merged(sources)) as merged:
            async for item in merged:
                yield item

    async def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

        def encode() -> list[int]:
            return self.tokenizer.encode(text, add_special_tokens)

        return await self._off_loop_if_long(len(text), encode)

    async def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation.

        Raises:
            ApiError: a message is wrong; names its field.
        """
        contents = [message.get("content") for message in messages]
        length = sum(len(c) if isinstance(c, str | list) else 0 for c in contents)
        try:
            return await self._off_loop_if_long(length, lambda: self.tokenizer.apply_chat(messages))
        except ValueError as error:
            raise ApiError.of(error, "messages") from None

    def check_model(self, model: str | None) -> None:
        """Raise an `ApiError` (404) unless this is the model that the server has."""
        if model is not None and model != self.model:
            raise ApiError(
                404,
                f"the model {model!r:.200} does not exist here; this server has {self.model!r}",
                "model",
                "model_not_found",
            )

    async def _encode(self, prompt: str | list[int]) -> list[int]:
        return await self.encode_text(prompt) if isinstance(prompt, str) else prompt

    async def _off_loop_if_long(self, num_chars: int, function: Callable[[], T]) -> T:
        if num_chars <= LONG_TEXT_CHARS:
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    def _read_retention(self, request: GenerationRequest) -> Retention:
        if request.retention is None and request.budget is None:
            return self._retention
        spec = self._retention if request.retention is None else request.retention
        try:
            retention = Retention.parse(spec, request.budget)
            self._check_retention(retention)
            return retention
        except ValueError as error:
            is_budget = request.budget is not None and str(error).startswith("budget")
            field = "budget" if is_budget else "retention"
            message = str(error) if is_budget else f"retention: {error}"
            raise ApiError(400, message, field, "invalid_value") from None

    def _check_length(
        self, prompt: list[int], field: str, sampling: SamplingParams, max_tokens_field: str
    ) -> None:
        if sampling.truncate_prompt_tokens is not None:
            return
        room = self.max_model_len - len(prompt)
        if room < 1:
            raise ApiError(
                400,
                f"{field} has {len(prompt)} tokens; the context of {self.max_model_len} has room "
                f"for {self.max_model_len - 1} and one new token",
                field,
                "context_length_exceeded",
            )
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise ApiError(
                400,
                f"{max_tokens_field} is {sampling.max_tokens}; beside the {len(prompt)} tokens of "
                f"the prompt the context of {self.max_model_len} has room for {room}",
                max_tokens_field,
                "context_length_exceeded",
            )

    async def _serve(
        self, job: Job, place: int, stream: bool
    ) -> AsyncGenerator[RequestOutput, None]:
        sampling = job.sampling
        if place and sampling.seed is not None:  # else equal prompts would get equal answers
            sampling = sampling.model_copy(update={"seed": sampling.seed + place * sampling.n})
        source = self._engine.generate(
            secrets.token_hex(12),
            job.prompts[place],
            sampling,
            retention=job.retention,
            stream=stream,
        )
        try:
            async with aclosing(source) as outputs:
                async for output in outputs:
                    yield output
        except ValueError as error:
            raise ApiError.of(error, job.field) from None


async def _merged(
    sources: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Items of several sources as they come, with the number of their source."""
    waiting = {asyncio.ensure_future(anext(s)): i for i, s in enumerate(sources)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                place = waiting.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(sources[place]))] = place
                yield place, output
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for source in sources:
            await source.aclose()
