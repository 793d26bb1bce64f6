"""One engine for several tasks: prompts in, answers or scores of every retention setting out."""

from collections.abc import Mapping, Sequence
from copy import copy
from types import TracebackType
from typing import Any, Self

from saqqara import LLM, Retention, SamplingParams
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.presets import ModelPresets, with_profile
from saqqara.cluster.request import RequestOutput, ScoreOutput
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import load_spec

from .grid import full_bytes, kept_share, local_bytes, with_full
from .result import Outcome, Result

TokenIds = Sequence[int]
ENGINE_SETTINGS = ("tokenizer", "load_format", "dtype", "attention_backend", "linear_backend")
"""Settings of the engine that may change answers."""


class Session:
    """A model, the settings that are compared, and an engine that starts when it is first needed.

    A prompt is submitted under all settings one after another, before the next prompt, so that an
    engine that shares equal prompts computes it once.

    Args:
        config: of the engine; its own retention is one of those compared.
        retentions: settings to compare; `full` is always the first.

    Raises:
        ValueError: a setting is wrong or does not fit the model.
    """

    def __init__(self, config: EngineConfig, retentions: Sequence[Retention]) -> None:
        self.config = config = with_profile(config)
        self._presets = ModelPresets.of(config)
        own = Retention.parse(config.retention, config.budget)
        self.retentions = with_full(map(self._presets.resolve, [own, *retentions]))
        self.spec = load_spec(config.model)
        self.tokenizer = Tokenizer.load(config.tokenizer or config.model)
        self._llm: LLM | None = None

    @property
    def llm(self) -> LLM:
        """The engine."""
        if self._llm is None:
            self._llm = LLM(**self.config.model_dump(exclude_unset=True))
        return self._llm

    def comparing(self, retentions: Sequence[Retention]) -> "Session":
        """A view of this session, on the same engine, that compares `full` and some settings.

        It is not to be closed: the engine is this session's.
        """
        view = copy(self)
        view._llm = self.llm
        view.retentions = with_full(map(self._presets.resolve, retentions))
        return view

    def answers(
        self, prompts: Sequence[TokenIds], max_tokens: Sequence[int]
    ) -> list[list[RequestOutput]]:
        """Greedy answers to each prompt under each setting; an end-of-sequence token ends one.

        Raises:
            ValueError: a prompt does not fit the engine.
            RuntimeError: a request failed.
        """
        return self.answers_under(self.retentions, prompts, max_tokens)

    def answers_under(
        self,
        retentions: Sequence[Retention],
        prompts: Sequence[TokenIds],
        max_tokens: Sequence[int],
    ) -> list[list[RequestOutput]]:
        """As `answers`, under some settings only."""
        num = len(retentions)
        outputs = self.llm.generate(
            prompt_token_ids=[list(prompt) for prompt in prompts for _ in retentions],
            sampling_params=[
                SamplingParams(temperature=0.0, max_tokens=limit)
                for limit in max_tokens
                for _ in retentions
            ],
            retention=[*retentions] * len(prompts),
        )
        _check(outputs)
        return [outputs[at : at + num] for at in range(0, len(outputs), num)]

    def scores(
        self,
        contexts: Sequence[TokenIds],
        continuations: Sequence[TokenIds],
        top_logprobs: int | None = None,
    ) -> list[list[ScoreOutput]]:
        """Scores of each continuation, given its context under each setting.

        With `top_logprobs` they name that many of the most likely tokens in each place, too.

        Raises:
            ValueError: a prompt does not fit the engine.
            RuntimeError: a request failed.
        """
        num = len(self.retentions)
        outputs = self.llm.score(
            [list(context) for context in contexts for _ in self.retentions],
            [list(continuation) for continuation in continuations for _ in self.retentions],
            retention=[*self.retentions] * len(contexts),
            top_logprobs=top_logprobs,
        )
        _check(outputs)
        return [outputs[at : at + num] for at in range(0, len(outputs), num)]

    def identity(self, task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What a result depends on: the fields of `Result` that are known before it is there."""
        engine = {name: getattr(self.config, name) for name in ENGINE_SETTINGS}
        return {
            "task": task,
            "model": self.config.model,
            "settings": {**settings, "engine": engine},
            "retentions": {one.label: one.to_dict() for one in self.retentions},
        }

    def result(self, task: str, settings: Mapping[str, Any], outcomes: list[Outcome]) -> Result:
        """A task's outcomes (at least one) with what they were made with."""
        lengths = [o.prompt_tokens for o in outcomes if o.retention == "full"]
        full, local = (
            sum(count(n, self.spec, self.config.dtype) for n in lengths) / len(lengths)
            for count in (full_bytes, local_bytes)
        )
        return Result(
            **self.identity(task, settings),
            kept_shares={one.label: kept_share(one, lengths, self.spec) for one in self.retentions},
            full_kv_bytes=full,
            local_kv_bytes=local,
            outcomes=tuple(outcomes),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None


def _check(outputs: Sequence[RequestOutput | ScoreOutput]) -> None:
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(output.error)
