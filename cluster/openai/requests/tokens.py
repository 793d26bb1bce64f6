"""`POST /tokenize` and `POST /detokenize`."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator

from saqqara.cluster.sampling import FailFastList

from .chats import ChatFields


class TokenizeRequest(ChatFields):
    """`POST /tokenize`: a text, or a chat as its template writes it.

    `add_special_tokens` is true by default for a text, and false for a chat.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: FailFastList[dict[str, Any]] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or messages must be given, and not both")
        return self


class DetokenizeRequest(BaseModel):
    """`POST /detokenize`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    tokens: FailFastList[int]
