"""Requests as clients write them, over HTTP and in batch lines alike. Imports its parent room."""

from .chats import ChatFields, ChatRequest
from .completions import CompletionRequest
from .generation import GenerationRequest
from .reading import check_limit, check_model, read_object, read_request
from .tokens import DetokenizeRequest, TokenizeRequest

__all__ = [
    "ChatFields",
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerationRequest",
    "TokenizeRequest",
    "check_limit",
    "check_model",
    "read_object",
    "read_request",
]
