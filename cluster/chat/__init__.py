"""A conversation: messages, tools, and the text that a template makes. Imports configs."""

from .messages import check_messages
from .template import (
    RESERVED_ARGS,
    Backend,
    ChatOptions,
    num_characters,
    read_template,
    render_chat,
)
from .tools import MAX_TOOLS, TOOL_NAME, check_tool_name, check_tools

__all__ = [
    "MAX_TOOLS",
    "RESERVED_ARGS",
    "TOOL_NAME",
    "Backend",
    "ChatOptions",
    "check_messages",
    "check_tool_name",
    "check_tools",
    "num_characters",
    "read_template",
    "render_chat",
]
