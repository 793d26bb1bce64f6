"""Replies of the paths that say what there is and how it is, and of the tokenizer's."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Count, Reply, UnixTime


class Tokens(Reply):
    """Token ids of a text or a chat."""

    tokens: list[Count]
    count: Count
    max_model_len: Annotated[int, Field(ge=1)]


class Text(Reply):
    """The text of token ids."""

    prompt: str


class Model(Reply):
    """A model that is here."""

    id: str
    object: Literal["model"]
    created: UnixTime
    owned_by: str
    max_model_len: Annotated[int, Field(ge=1)]


class Models(Reply):
    """The models that are here."""

    object: Literal["list"]
    data: list[Model]


class Health(Reply):
    """All is well."""

    status: Literal["ok"]


class Version(Reply):
    """The server's version."""

    version: str
