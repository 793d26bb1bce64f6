"""`/tokenize` and `/detokenize`."""

from fastapi import FastAPI, Request
from fastapi.responses import Response

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.requests import DetokenizeRequest, TokenizeRequest
from saqqara.cluster.server.docs import Endpoint

from .base import Door, json_reply, register


class TokenRoutes:
    """Texts to token ids and back."""

    endpoints = (
        Endpoint("POST", "/tokenize", "The token ids of a text or a chat.", TokenizeRequest),
        Endpoint("POST", "/detokenize", "The text of token ids.", DetokenizeRequest),
    )

    def __init__(self, door: Door) -> None:
        self._door = door
        self._generation = door.generation

    def add_to(self, app: FastAPI) -> None:
        """Register the paths."""
        register(app, "POST", {"/tokenize": self.tokenize, "/detokenize": self.detokenize})

    async def tokenize(self, request: Request) -> Response:
        """`POST /tokenize`: the token ids of a text or a chat."""
        body = await self._door.read(request, TokenizeRequest)
        self._generation.check_model(body.model)
        if body.messages is not None:
            tokens = await self._generation.encode_chat(body.messages, body.chat_options())
        else:
            tokens = await self._generation.encode_text(
                body.prompt or "", add_special_tokens=body.add_special_tokens is not False
            )
        return json_reply(
            {
                "tokens": tokens,
                "count": len(tokens),
                "max_model_len": self._generation.max_model_len,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """`POST /detokenize`: the text of token ids."""
        body = await self._door.read(request, DetokenizeRequest)
        self._generation.check_model(body.model)
        tokenizer = self._generation.tokenizer
        for place, token in enumerate(body.tokens):
            if not 0 <= token < tokenizer.vocab_size:
                field = f"tokens[{place}]"
                raise ApiError(400, f"{field}={token} is no token", field, "invalid_value")
        return json_reply({"prompt": await self._generation.decode(body.tokens)})
