"""`/tokenize` and `/detokenize`."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.requests import DetokenizeRequest, TokenizeRequest
from saqqara.cluster.server.docs import Endpoint

from .base import Door, json_reply, register

ENDPOINTS = (
    Endpoint("POST", "/tokenize", "The token ids of a text or a chat.", TokenizeRequest),
    Endpoint("POST", "/detokenize", "The text of token ids.", DetokenizeRequest),
)
INFO = Endpoint("GET", "/tokenizer_info", "The tokenizer's settings and chat template.")


class TokenRoutes:
    """Texts to token ids and back."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._generation = door.generation

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """What there is."""
        shown = (INFO,) if self._generation.shows_tokenizer else ()
        return (*ENDPOINTS, *shown)

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        register(app, "POST", {"/tokenize": self.tokenize, "/detokenize": self.detokenize})
        if self._generation.shows_tokenizer:
            register(app, "GET", {"/tokenizer_info": self.info})

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: the token ids of a text or a chat."""
        body = await self._door.read(request, TokenizeRequest)
        self._generation.check_model(body.model)
        owner = self._door.sharer(request)
        if body.messages is not None:
            options = body.chat_options(trusts_templates=self._generation.trusts_templates)
            tokens = await self._generation.encode_chat(body.messages, options, owner)
        else:
            tokens = await self._generation.encode_text(
                body.prompt or "", owner, add_special_tokens=body.add_special_tokens is not False
            )
        reply: dict[str, Any] = {
            "tokens": tokens,
            "count": len(tokens),
            "max_model_len": self._generation.max_model_len,
        }
        if body.return_token_strs:
            reply["token_strs"] = await self._generation.token_strings(tokens, owner)
        return json_reply(reply)

    async def info(self, request: Request) -> Response:
        """`GET /tokenizer_info`: what a client needs to tokenise as the server does."""
        self._door.authorize(request)
        return json_reply(self._generation.tokenizer.info())

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`: the text of token ids."""
        body = await self._door.read(request, DetokenizeRequest)
        self._generation.check_model(body.model)
        tokenizer = self._generation.tokenizer
        for place, token in enumerate(body.tokens):
            if not 0 <= token < tokenizer.vocab_size:
                field = f"tokens[{place}]"
                raise ApiError(400, f"{field}={token} is no token", field, "invalid_value")
        owner = self._door.sharer(request)
        return json_reply({"prompt": await self._generation.decode(body.tokens, owner)})
