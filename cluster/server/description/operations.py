"""Replies of the paths that say what there is and how it is, and of the tokenizer's."""

from typing import Annotated, Literal

from pydantic import Field

from .base import Count, Reply, UnixTime


class Tokens(Reply):
    """Token ids of a text or a chat."""

    tokens: list[Count]
    count: Count
    max_model_len: Annotated[int, Field(ge=1)]
    token_strs: list[str] | None = None


class Text(Reply):
    """The text of token ids."""

    prompt: str


class Model(Reply):
    """A model that is here."""

    id: str
    object: Literal["model"]
    created: UnixTime
    owned_by: str
    root: str
    max_model_len: Annotated[int, Field(ge=1)]


class Models(Reply):
    """The models that are here."""

    object: Literal["list"]
    data: list[Model]


class TokenizerInfo(Reply):
    """What another program needs to tokenise as the server does."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    vocab_size: Annotated[int, Field(ge=1)]
    chat_template: str | dict[str, str] | None


class Load(Reply):
    """Requests that run or wait."""

    server_load: Count


class Health(Reply):
    """All is well."""

    status: Literal["ok"]


class Version(Reply):
    """The server's version."""

    version: str
