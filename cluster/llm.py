"""The Python front door: `LLM`, with the names and the meaning of vLLM's offline `LLM`."""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, cast, overload

from saqqara.cluster.engine.report import EngineReport
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.compression.retention import Retention
from saqqara.configs.shown import shown

from .chat import ChatOptions
from .errors import EngineDeadError
from .launch import launch
from .long_wait import LongWait
from .prompts import (
    Budget,
    as_list,
    is_list,
    is_single,
    one_conversation,
    one_prompt,
    with_memory,
    with_settings,
    with_turns,
)
from .request import Request, RequestOutput, RetentionSpec, ScoreOutput
from .sampling import SamplingParams, scoring_params
from .settings import engine_config

POLL_SECONDS = 1.0
_NO_ID = ""  # of requests that are not checked yet

Message = Mapping[str, Any]
GivenPrompt = str | Sequence[int] | Mapping[str, Any]
Output = RequestOutput | ScoreOutput


class LLM:
    """A model that answers prompts, in this process or spread over Ray workers.

    Every field of `EngineConfig` (`configs/schema.py`) is also a keyword argument here; unknown
    ones are errors.

    Args:
        model: local folder or hub id of a Llama-class model.
        tokenizer: folder or hub id; default: the model's own.
        tensor_parallel_size: ranks that share each layer.
        pipeline_parallel_size: stages of consecutive layers.
        max_model_len: prompt plus generated tokens at most; default: the model's context.
        max_num_seqs: sequences that run at once.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        seed: seeds the requests that bring no seed of their own.
        retention: which keys and values are kept, for requests that do not say; see `Retention`.
        budget: mean kept tokens per layer and kv head, or a share of the prompt such as "25%".
        executor: `local` (one rank, in this process) or `ray`.
        attention_backend: `auto` or a backend's name.
        settings: any other field of `EngineConfig`.

    Raises:
        ValueError: a setting is unknown, wrong, or does not fit the model; names it.

    Example:
        >>> with LLM("path/to/model", retention="pyramidkv", budget="25%") as llm:
        ...     print(llm.generate("Once upon a time")[0].outputs[0].text)
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        dtype: str = "auto",
        seed: int = 0,
        retention: RetentionSpec = "full",
        budget: Budget | None = None,
        executor: Literal["local", "ray"] = "local",
        attention_backend: str = "auto",
        **settings: Any,
    ) -> None:
        if isinstance(retention, Retention):
            retention = retention.to_dict()
        named = {
            "model": str(model),
            "tokenizer": tokenizer,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "dtype": dtype,
            "seed": seed,
            "retention": retention if isinstance(retention, str) else dict(retention),
            "budget": budget,
            "executor": executor,
            "attention_backend": attention_backend,
        }
        self.config = engine_config(named | settings, "LLM")
        self._client = launch(self.config)
        self._tokenizer: Tokenizer | None = None
        self._ids = itertools.count()
        self._turn = threading.Lock()  # one call at a time: they share the client's outputs

    def generate(
        self,
        prompts: GivenPrompt | Sequence[GivenPrompt] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        prompt_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        use_tqdm: bool = True,
        retention: RetentionSpec | Sequence[RetentionSpec | None] | None = None,
        budget: Budget | Sequence[Budget | None] | None = None,
        priority: int | Sequence[int] = 0,
        timeout_seconds: float | None = None,
        cache_salt: str = "",
        session: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; the results come in the order of the prompts.

        Args:
            prompts: one or several of: text, token ids, `{"prompt": text}`,
                `{"prompt_token_ids": token ids}`.
            sampling_params: for all prompts, or one for each.
            prompt_token_ids: token ids of one or several prompts, instead of `prompts`.
            use_tqdm: show progress: a bar on a terminal, else a line in the log every few seconds.
            retention: overrides the engine's, for all prompts or one for each.
            budget: overrides the engine's, for all prompts or one for each.
            priority: a lower one goes first; for all prompts or one for each.
            timeout_seconds: after which a prompt's output ends with what it has and the
                `error_code` `deadline_exceeded`; default: never.
            cache_salt: cached prefixes are shared only among requests with the same one.
            session: as for `chat`.

        Raises:
            ValueError: a prompt or setting is wrong; names the prompt's index.
            EngineDeadError: the engine has failed.
        """
        if (prompts is None) == (prompt_token_ids is None):
            raise ValueError("generate needs prompts or prompt_token_ids, and not both")
        given = prompts if prompts is not None else prompt_token_ids
        requests = [
            Request(_NO_ID, one_prompt(prompt, i))
            for i, prompt in enumerate(as_list(given, "prompts"))
        ]
        requests = with_turns(requests, priority, timeout_seconds)
        requests = with_memory(requests, cache_salt, session)
        return self._generate(requests, "prompts", sampling_params, retention, budget, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        retention: RetentionSpec | Sequence[RetentionSpec | None] | None = None,
        budget: Budget | Sequence[Budget | None] | None = None,
        priority: int | Sequence[int] = 0,
        timeout_seconds: float | None = None,
        cache_salt: str = "",
        session: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, with the model's chat template.

        Args:
            messages: one conversation (a list of `{"role", "content"}`) or several.
            sampling_params: as for `generate`.
            use_tqdm: as for `generate`.
            chat_template: a Jinja template instead of the model's own.
            add_generation_prompt: end with the head of the assistant's answer.
            continue_final_message: leave the final message open, so that the answer goes on with
                it; needs `add_generation_prompt=False`.
            chat_template_kwargs: variables for the template, e.g. `{"enable_thinking": False}`.
            tools: what the model may call, in OpenAI's form, for the template; the answer's text
                has the calls as the model writes them.
            retention: as for `generate`.
            budget: as for `generate`.
            priority: as for `generate`.
            timeout_seconds: as for `generate`.
            cache_salt: as for `generate`.
            session: a name for the conversation, or one for each: what is kept of it stays for the
                next call with this name, which computes only what is new if its messages begin with
                the earlier ones and the answer. See `end_conversation`.

        Raises:
            ValueError: a conversation or setting is wrong; names the conversation's index.
            EngineDeadError: the engine has failed.
        """
        if not is_list(messages):
            raise ValueError(
                "messages must be a list of messages, or a list of those, not "
                f"{type(messages).__name__} {shown(messages)}"
            )
        several: Sequence[Any] = messages
        if messages and isinstance(messages[0], Mapping):
            several = [messages]
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_args=dict(chat_template_kwargs or {}),
            chat_template=chat_template,
            tools=tools or (),
        )
        requests = [
            Request(_NO_ID, messages=one_conversation(given, i), chat_options=options)
            for i, given in enumerate(several)
        ]
        requests = with_turns(requests, priority, timeout_seconds)
        requests = with_memory(requests, cache_salt, session)
        return self._generate(requests, "messages", sampling_params, retention, budget, use_tqdm)

    def end_conversation(self, session: str) -> bool:
        """Give up what is kept of a conversation; whether there was anything."""
        return self._client.end_conversation(session)

    def reset_prefix_cache(self) -> bool:
        """Give up the cached prefixes that nobody uses now; whether none is left."""
        return self._client.reset_prefix_cache()

    @overload
    def score(  # type: ignore[overload-overlap]  # a str is a Sequence[str], too
        self,
        context: str | Sequence[int],
        continuation: str | Sequence[int],
        *,
        use_tqdm: bool = True,
        retention: RetentionSpec | None = None,
        budget: Budget | None = None,
        top_logprobs: int | None = None,
        token_by_token: bool = False,
    ) -> ScoreOutput: ...

    @overload
    def score(
        self,
        context: Sequence[str] | Sequence[Sequence[int]],
        continuation: Sequence[str] | Sequence[Sequence[int]],
        *,
        use_tqdm: bool = True,
        retention: RetentionSpec | Sequence[RetentionSpec | None] | None = None,
        budget: Budget | Sequence[Budget | None] | None = None,
        top_logprobs: int | None = None,
        token_by_token: bool = False,
    ) -> list[ScoreOutput]: ...

    def score(
        self,
        context: Any,
        continuation: Any,
        *,
        use_tqdm: bool = True,
        retention: RetentionSpec | Sequence[RetentionSpec | None] | None = None,
        budget: Budget | Sequence[Budget | None] | None = None,
        top_logprobs: int | None = None,
        token_by_token: bool = False,
    ) -> ScoreOutput | list[ScoreOutput]:
        """Log-probabilities of continuations, given contexts whose KV went through retention.

        Args:
            context: text or token ids, or a list of them.
            continuation: text or token ids, or a list with one for each context.
            use_tqdm: as for `generate`.
            retention: as for `generate`.
            budget: as for `generate`.
            top_logprobs: most likely tokens to report in each place, 20 at most; default: none.
            token_by_token: feed each continuation in the decode steps that generating it would
                take, instead of in pieces (which end where rows are compacted while decoding, so
                they give the same but for rounding, and sooner).

        Raises:
            ValueError: an input or setting is wrong; names the index.
            EngineDeadError: the engine has failed.
        """
        contexts = as_list(context, "context")
        continuations = as_list(continuation, "continuation")
        if len(contexts) != len(continuations):
            raise ValueError(
                f"continuation has {len(continuations)} entries for {len(contexts)} contexts; "
                "it needs one for each"
            )
        requests = [
            Request(
                _NO_ID,
                score_continuation=one_prompt(after, i, "continuation"),
                prompt=one_prompt(before, i, "context"),
                token_by_token=token_by_token,
            )
            for i, (before, after) in enumerate(zip(contexts, continuations, strict=True))
        ]
        requests = with_settings(requests, scoring_params(top_logprobs), retention, budget)
        outputs = cast("list[ScoreOutput]", self._run(requests, "context", use_tqdm))
        return outputs[0] if is_single(context) and is_single(continuation) else outputs

    def get_tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, loaded at the first call."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self.config.tokenizer or self.config.model)
        return self._tokenizer.backend

    def report(self) -> EngineReport:
        """Measurements since the start, or since the last `reset_stats`."""
        return self._client.report()

    def reset_stats(self) -> None:
        """Start the measurements anew."""
        self._client.reset_stats()

    def shutdown(self) -> None:
        """Stop the engine and release what it holds; calling it again does nothing."""
        self._client.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def _generate(
        self,
        requests: list[Request],
        what: str,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        retention: RetentionSpec | Sequence[RetentionSpec | None] | None,
        budget: Budget | Sequence[Budget | None] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        requests = with_settings(requests, sampling_params, retention, budget)
        return cast("list[RequestOutput]", self._run(requests, what, use_tqdm))

    def _run(self, requests: list[Request], what: str, use_tqdm: bool) -> list[Output]:
        """Hand requests to the engine and wait for all of them.

        They get their ids here, after all checks: seeds come from ids, so that a call which is
        refused changes nothing of what later ones sample.
        """
        requests = [replace(request, request_id=str(next(self._ids))) for request in requests]
        index = {request.request_id: i for i, request in enumerate(requests)}
        outputs: dict[str, Output] = {}
        with self._turn, _progress(len(requests), use_tqdm) as advance:
            try:
                for rejection in self._client.submit(requests):
                    raise ValueError(f"{what}[{index[rejection.request_id]}]: {rejection.error}")
                while len(outputs) < len(requests):
                    for output in self._client.poll(POLL_SECONDS):
                        if output.request_id in index:  # else: the rest of a call that failed
                            outputs[output.request_id] = output
                            advance()
            except BaseException as error:
                if not isinstance(error, EngineDeadError):
                    self._client.abort(index.keys() - outputs.keys())
                raise
        return [outputs[request_id] for request_id in index]


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, a line in the log elsewhere; yields what counts one more."""
    if not wanted:
        yield lambda: None
        return
    if not sys.stderr.isatty():
        num_ended = 0

        def advance() -> None:
            nonlocal num_ended
            num_ended += 1

        with LongWait(lambda: f"{num_ended} of {total} requests have ended"):
            yield advance
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)
