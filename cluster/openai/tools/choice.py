"""What a request says of tools: which are offered, and whether one is to be called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from saqqara.cluster.chat import check_tools
from saqqara.cluster.openai.formats.deltas import Schemas
from saqqara.cluster.openai.formats.forced import named_schema, required_schema

Mode = Literal["none", "auto", "required", "named"]
_WORDS = ("none", "auto", "required")
_FORMS = (
    "must be 'none', 'auto', 'required', "
    '{"type": "function", "function": {"name": ...}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """How a chat uses tools.

    Attributes:
        mode: as `tool_choice` says; `none` also where there are no tools.
        tools: those that the model is told of; with `none` it is told of none.
        is_parallel: an answer may have several calls.
    """

    mode: Mode = "none"
    tools: tuple[Mapping[str, Any], ...] = ()
    is_parallel: bool = True

    @property
    def schemas(self) -> Schemas:
        """The parameters of the tools that may be called, by name."""
        functions = [tool["function"] for tool in self.tools]
        return {function["name"]: function["parameters"] for function in functions}

    @property
    def max_calls(self) -> int | None:
        """Calls of an answer; None for no bound."""
        return None if self.is_parallel else 1

    @property
    def is_forced(self) -> bool:
        """Whether a tool is to be called, whatever the model would do."""
        return self.mode in ("required", "named")

    def answer_schema(self) -> dict[str, Any] | None:
        """The JSON schema of the answer, where a tool is to be called."""
        if self.mode == "required":
            return required_schema(self.schemas, self.max_calls)
        if self.mode == "named":
            (parameters,) = self.schemas.values()
            return named_schema(parameters)
        return None


NO_TOOLS = ToolUse()


def read_tool_use(
    tools: Sequence[Any] | None, tool_choice: Any, parallel_tool_calls: bool | None
) -> ToolUse:
    """How a chat uses tools.

    Args:
        tools: as the client defines them.
        tool_choice: as the client writes it; None is `auto`.
        parallel_tool_calls: whether an answer may have several calls; None is yes.

    Raises:
        ValueError: something is wrong; names the field.
    """
    checked = check_tools(tools or [])
    mode, names = _read_choice(tool_choice)
    if not checked:
        if mode in ("required", "named") or names is not None:
            raise ValueError("tool_choice: there are no tools to call; give tools, or leave it out")
        return NO_TOOLS
    if mode == "none":
        return NO_TOOLS
    if names is not None:
        known = {tool["function"]["name"]: tool for tool in checked}
        for name in names:
            if name not in known:
                shown = ", ".join(sorted(known))
                raise ValueError(f"tool_choice: {name!r:.80} is none of the tools ({shown:.200})")
        # Of several, the model is told of those alone that it may call.
        checked = [known[name] for name in names]
    return ToolUse(mode, tuple(checked), parallel_tool_calls is not False)


def _read_choice(choice: Any) -> tuple[Mode, list[str] | None]:
    """The mode, and the names of the tools that may be called; None for all."""
    if choice in (None, "", {}):
        return "auto", None
    if choice in _WORDS:
        return choice, None
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        return "named", [_function_name(choice)]
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        # OpenAI nests the two; the Responses API does not.
        allowed = choice.get("allowed_tools", choice)
        mode = allowed.get("mode", "auto") if isinstance(allowed, Mapping) else None
        tools = allowed.get("tools") if isinstance(allowed, Mapping) else None
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            return mode, list(dict.fromkeys(_function_name(tool) for tool in tools))
    raise ValueError(f"tool_choice {_FORMS}, not {choice!r:.80}")


def _function_name(value: Any) -> str:
    """The name in `{"type": "function", "function": {"name": ...}}`."""
    function = value.get("function", value) if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or value.get("type") != "function":
        raise ValueError(f"tool_choice {_FORMS}, not {value!r:.80}")
    return name
