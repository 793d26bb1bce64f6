"""`/v1/conversations`: an extension, of which there is only the end of one."""

from fastapi import FastAPI, Request
from fastapi.responses import Response

from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.request import check_conversation_id
from saqqara.cluster.server.docs import Endpoint

from .base import Door, json_reply, register

PATH = "/v1/conversations/{conversation_id}"


class ConversationRoutes:
    """Conversations, which begin with the first request that names them."""

    endpoints = (Endpoint("DELETE", PATH, "Forget what is kept of a conversation."),)

    def __init__(self, door: Door) -> None:
        self._door = door
        self._generation = door.generation

    def add_to(self, app: FastAPI) -> None:
        """Register the path."""
        register(app, "DELETE", {PATH: self.end})

    async def end(self, request: Request, conversation_id: str) -> Response:
        """`DELETE /v1/conversations/{conversation_id}`: of the caller's own ones.

        Raises:
            ApiError: there is none (404), a turn of it has not ended (409), or the key is wrong.
        """
        self._door.authorize(request)
        engine, owner = self._generation.engine, self._door.sharer(request)
        try:
            check_conversation_id(conversation_id)
            is_ended = await engine.end_conversation(conversation_id, owner)
        except ValueError as error:
            raise ApiError.of(error, "conversation_id") from None
        if not is_ended:
            message = f"conversation {conversation_id!r} is not here, or nothing of it is kept"
            raise ApiError(404, message, "conversation_id", "not_found")
        return json_reply(
            {"id": conversation_id, "object": "conversation.deleted", "deleted": True}
        )
