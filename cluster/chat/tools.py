"""The tools that a model may call, as clients define them."""

import re
from collections.abc import Mapping
from typing import Any

MAX_TOOLS = 128
MAX_TOOL_VALUES = 20_000  # numbers, texts, lists and objects in all of a request's tools
MAX_TOOL_DEPTH = 64
TOOL_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
"""OpenAI's letters, and the dots that some servers of tools put into names."""
_NO_PARAMETERS = {"type": "object", "properties": {}}


def check_tools(tools: Any) -> list[dict[str, Any]]:
    """Check what a model may call and return it as templates take it.

    Each is `{"type": "function", "function": {"name", "description", "parameters"}}`; parameters
    are a JSON schema of an object, by default of an empty one. `strict` is taken out: it asks
    nothing of the model.

    Raises:
        ValueError: naming the field, e.g. `tools[2].function.name`.
    """
    if not isinstance(tools, list | tuple):
        raise ValueError(f"tools must be a list of tools, not {tools!r:.80}")
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"tools: there may be {MAX_TOOLS} at most, not {len(tools)}")
    if _num_values(tools, "tools") > MAX_TOOL_VALUES:
        raise ValueError(f"tools: they may have {MAX_TOOL_VALUES} values at most")
    checked = [_check_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    first: dict[str, int] = {}
    for index, tool in enumerate(checked):
        name = tool["function"]["name"]
        if first.setdefault(name, index) != index:
            raise ValueError(
                f"tools[{index}].function.name: {name!r} is already the name of "
                f"tools[{first[name]}]"
            )
    return checked


def _check_tool(tool: Any, field: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, Mapping) else tool
        raise ValueError(f"{field}.type must be 'function', not {kind!r:.80}")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise ValueError(f"{field}.function must be an object with a name, not {function!r:.80}")
    check_tool_name(function.get("name"), f"{field}.function.name")
    if not isinstance(function.get("description") or "", str):
        raise ValueError(f"{field}.function.description must be a string")
    if not isinstance(function.get("strict") or False, bool):
        raise ValueError(f"{field}.function.strict must be true or false")
    given = {k: v for k, v in function.items() if v is not None and k != "strict"}
    parameters = given.get("parameters") or dict(_NO_PARAMETERS)
    _check_parameters(parameters, f"{field}.function.parameters")
    return {**tool, "function": {**given, "parameters": parameters}}


def check_tool_name(name: Any, field: str) -> None:
    """Raise a ValueError, which names the field, unless a tool may be called so."""
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise ValueError(
            f"{field} must have 1 to 128 letters, digits, '_', '-' and '.', not {name!r:.80}"
        )


def _check_parameters(schema: Any, field: str) -> None:
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ValueError(f'{field} must be a JSON schema of type "object", not {schema!r:.80}')
    if not isinstance(schema.get("properties", {}), Mapping):
        raise ValueError(f"{field}.properties must be an object with a schema for each name")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{field}.required must be a list of names")


def _num_values(value: Any, field: str, depth: int = 0) -> int:
    """How many values there are in a JSON value, itself among them."""
    if depth > MAX_TOOL_DEPTH:
        raise ValueError(f"{field}: nested more than {MAX_TOOL_DEPTH} levels deep")
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 1
    return 1 + sum(_num_values(item, field, depth + 1) for item in value)
