"""`POST /v1/completions`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.fields import IdleCompletionFields
from saqqara.cluster.openai.shown import Shown
from saqqara.cluster.sampling import FailFastList

from .generation import GenerationRequest
from .reading import check_limit


class CompletionRequest(GenerationRequest, IdleCompletionFields):
    """`POST /v1/completions`."""

    prompt: str | FailFastList[int] | FailFastList[str] | FailFastList[FailFastList[int]]
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @property
    def names(self) -> Mapping[str, str]:
        """See `GenerationRequest`."""
        if self.echo and self.prompt_logprobs is None:
            return {**super().names, "prompt_logprobs": "echo"}
        return super().names

    @property
    def shown(self) -> Shown:
        """See `GenerationRequest`."""
        return replace(super().shown, echo=bool(self.echo), answer=not self._is_prompt_only)

    @property
    def num_prompt_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)

    @property
    def max_new_tokens(self) -> tuple[str, int | None]:
        """See `GenerationRequest`; with `echo` there may be no answer: one token is left out."""
        return "max_tokens", 1 if self._is_prompt_only else self.max_tokens

    @property
    def _is_prompt_only(self) -> bool:
        return bool(self.echo) and self.max_tokens == 0

    @property
    def num_logprobs(self) -> int | None:
        """See `GenerationRequest`."""
        return self.logprobs

    @property
    def default_max_tokens(self) -> int | None:
        """See `GenerationRequest`; this is OpenAI's."""
        return 16

    def prompts(self, max_prompts: int) -> list[str | list[int]]:
        """The prompts one by one.

        Raises:
            ApiError: there are none or too many.
        """
        if not self.prompt:
            message = "prompt is empty; it needs a text or token ids"
            raise ApiError(400, message, "prompt", "invalid_value")
        if isinstance(self.prompt, str):
            return [self.prompt]
        prompts: list[Any] = list(self.prompt)
        if isinstance(prompts[0], int):
            return [prompts]
        check_limit("prompt", len(prompts), max_prompts, " prompts")
        if len(prompts) > 1 and self.conversation_id is not None:
            message = (
                f"prompt: a turn of a conversation has one prompt, not {len(prompts)}; leave out "
                "conversation_id"
            )
            raise ApiError(400, message, "prompt", "invalid_value")
        return prompts
