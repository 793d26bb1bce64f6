"""`POST /v1/completions`."""

from typing import Any

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.fields import IdleCompletionFields
from saqqara.cluster.sampling import FailFastList

from .generation import GenerationRequest
from .reading import check_limit


class CompletionRequest(GenerationRequest, IdleCompletionFields):
    """`POST /v1/completions`."""

    prompt: str | FailFastList[int] | FailFastList[str] | FailFastList[FailFastList[int]]
    logprobs: int | None = None

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
        return prompts
