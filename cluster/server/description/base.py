"""What the models of replies have in common."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    """An object of a reply; it has these fields and no others."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


Count = Annotated[int, Field(ge=0)]
UnixTime = Annotated[int, Field(ge=0, description="Unix time in seconds.")]


class KvCache(Reply):
    """Keys and values at the end: what was kept, and what full retention would keep."""

    kept_tokens: Count
    full_tokens: Count
    kept_bytes: Count
    full_bytes: Count
    kept_tokens_by_layer: list[Count]
    local_bytes: Count


class TopLogprob(Reply):
    """One of the most likely tokens in a place."""

    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class TokenLogprob(TopLogprob):
    """A token of an answer, and the most likely in its place."""

    top_logprobs: list[TopLogprob]
    token_id: Count | None = None


ErrorType = Literal[
    "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
]


class ErrorDetails(Reply):
    """What is wrong and what would be right."""

    message: str
    type: ErrorType
    param: Annotated[str | None, Field(description="The field that is wrong.")]
    code: Annotated[str | None, Field(description="A name for programs.")]


class Error(Reply):
    """What every error is answered with."""

    error: ErrorDetails
