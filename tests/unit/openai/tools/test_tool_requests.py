"""What requests say of tools is checked before anything is queued, and errors name the field."""

from typing import Any, get_args

import pytest
from jsonschema import Draft202012Validator

from saqqara.cluster.chat import check_messages, check_tools
from saqqara.cluster.openai.errors import ApiError
from saqqara.cluster.openai.formats.hermes import HermesParser
from saqqara.cluster.openai.requests import ChatRequest, TokenizeRequest, read_request
from saqqara.cluster.openai.tools import registry
from saqqara.cluster.openai.tools.choice import ToolUse, read_tool_use
from saqqara.cluster.openai.tools.reader import PLAIN
from saqqara.cluster.openai.tools.style import ChatStyle
from saqqara.configs.schema import EngineConfig

Json = dict[str, Any]


def tool(name: str = "weather", **fields: Any) -> Json:
    return {"type": "function", "function": {"name": name, **fields}}


CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"]}
CITY["$defs"] = {"city": {"type": "string"}}
NAMED = {"type": "function", "function": {"name": "weather"}}
USER = {"role": "user", "content": "Paris?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}


def chat(**fields: Any) -> ChatRequest:
    return read_request(ChatRequest, {"model": "m", "messages": [USER], **fields})


def test_a_tool_is_handed_to_the_template_as_it_was_defined() -> None:
    given = tool(description="Look.", parameters=CITY, strict=True)
    assert check_tools([given]) == [tool(description="Look.", parameters=CITY)]
    assert check_tools([tool(parameters=None)]) == [
        tool(parameters={"type": "object", "properties": {}})
    ]


def deep(levels: int) -> Json:
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [5]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool(), tool("")]}, "tools[1].function.name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 129)]}, "tools[0].function.name"),
        ({"tools": [tool(description=5)]}, "tools[0].function.description"),
        ({"tools": [tool(strict="yes")]}, "tools[0].function.strict"),
        ({"tools": [tool(parameters=[1])]}, "tools[0].function.parameters"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        (
            {"tools": [tool(parameters={"properties": 5})]},
            "tools[0].function.parameters.properties",
        ),
        ({"tools": [tool(parameters={"required": [5]})]}, "tools[0].function.parameters.required"),
        ({"tools": [tool(parameters=deep(70))]}, "tools"),
        ({"tools": [tool(parameters={"enum": list(range(20_000))})]}, "tools"),
        ({"tools": [tool(f"t{i}") for i in range(129)]}, "tools"),
        ({"tools": [tool(), tool()]}, "tools[1].function.name"),
        ({"tools": tool()}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": 5}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [tool("time")], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [tool()], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"functions": [{"name": "weather"}]}, "functions"),
        ({"function_call": {"name": "weather"}}, "function_call"),
    ],
)
def test_what_is_wrong_with_tools_is_named(fields: Json, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param) == (400, param), str(caught.value)


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tool_choice": "auto"}])
def test_without_tools_there_is_nothing_to_call(fields: Json) -> None:
    assert chat(**fields).tool_use == ToolUse()


def test_tools_that_must_not_be_called_are_not_told_of() -> None:
    request = chat(tools=[tool()], tool_choice="none")
    assert request.tool_use.mode == "none"
    assert request.chat_options().tools == ()
    assert len(chat(tools=[tool()]).chat_options().tools) == 1


def test_of_allowed_tools_the_others_are_not_told_of() -> None:
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]}
    choice = {"type": "allowed_tools", "allowed_tools": allowed}
    use = chat(tools=[tool(), tool("time")], tool_choice=choice).tool_use
    assert (use.mode, list(use.schemas)) == ("required", ["time"])


def test_a_prompt_is_counted_with_its_tools() -> None:
    request = read_request(TokenizeRequest, {"messages": [USER], "tools": [tool()]})
    assert [t["function"]["name"] for t in request.chat_options().tools] == ["weather"]


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ([{"name": "weather", "parameters": {"city": "Paris"}}], True),
        (
            [{"name": "weather", "parameters": {"city": "P"}}, {"name": "time", "parameters": {}}],
            True,
        ),
        ([{"name": "weather", "parameters": {"city": 5}}], False),
        ([{"name": "weather", "parameters": {}}], False),
        ([{"name": "nobody", "parameters": {}}], False),
        ([{"name": "time", "parameters": []}], False),
        ([], False),
    ],
)
def test_a_required_call_has_a_schema(answer: Any, is_right: bool) -> None:
    """Its references lead to where the tools' definitions have moved."""
    use = read_tool_use([tool(parameters=CITY), tool("time")], "required", None)
    schema = use.answer_schema()
    assert schema is not None
    Draft202012Validator.check_schema(schema)
    assert Draft202012Validator(schema).is_valid(answer) == is_right


def test_one_call_is_required_where_several_are_not_wanted() -> None:
    use = read_tool_use([tool("time")], "required", False)
    call = {"name": "time", "parameters": {}}
    schema = use.answer_schema()
    assert schema is not None
    validator = Draft202012Validator(schema)
    assert (validator.is_valid([call]), validator.is_valid([call, call])) == (True, False)


def test_a_named_call_has_the_schema_of_its_arguments() -> None:
    use = read_tool_use([tool(parameters=CITY), tool("time")], NAMED, None)
    assert use.answer_schema() == CITY
    assert list(use.schemas) == ["weather"]


def test_a_conversation_has_calls_and_their_results() -> None:
    messages: list[Json] = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny", "name": "weather"},
    ]
    checked = check_messages(messages)
    function = {"name": "weather", "arguments": {}}
    assert checked[1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{**CALL, "function": function}],
        "reasoning_content": "hm",
    }
    assert checked[2] == messages[2]
    assert check_messages(checked) == checked


@pytest.mark.parametrize(
    "refused",
    [
        {"content": None, "refusal": "no"},
        {"content": [{"type": "refusal", "refusal": "no"}], "refusal": None},
        {"content": "no", "refusal": ""},
    ],
)
def test_a_refusal_is_what_the_assistant_said(refused: Json) -> None:
    said = {"role": "assistant", "content": "no"}
    assert check_messages([USER, {"role": "assistant", **refused}]) == [USER, said]


def call(**fields: Any) -> list[Json]:
    function = {"name": "weather", "arguments": "{}"}
    outer: Json = {name: fields.pop(name) for name in ("id", "type") if name in fields}
    return [{**CALL, **outer, "function": {**function, **fields}}]


def assistant(**fields: Any) -> Json:
    return {"role": "assistant", "content": "x", **fields}


ARGUMENTS = "tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (assistant(tool_calls=call(arguments="{")), ARGUMENTS),
        (assistant(tool_calls=call(arguments="[]")), ARGUMENTS),
        (assistant(tool_calls=call(arguments='{"a": NaN}')), ARGUMENTS),
        (assistant(tool_calls=call(arguments='{"a": 1e999}')), ARGUMENTS),
        (assistant(tool_calls=call(arguments=5)), ARGUMENTS),
        (assistant(tool_calls=call(name="a b")), "tool_calls[0].function.name"),
        (assistant(tool_calls=call(id="")), "tool_calls[0].id"),
        (assistant(tool_calls=call(id="x" * 300)), "tool_calls[0].id"),
        (assistant(tool_calls=call(type="custom")), "tool_calls[0].type"),
        (assistant(tool_calls=[5]), "tool_calls[0]"),
        (assistant(tool_calls="no"), "tool_calls"),
        (assistant(tool_calls=call() * 129), "tool_calls"),
        (assistant(function_call={"name": "weather"}), "function_call"),
        (assistant(reasoning_content=5), "reasoning_content"),
        (assistant(content=None), "content"),
        (assistant(content=[{"type": "refusal", "refusal": 5}]), "content[0].refusal"),
        (assistant(refusal="no"), "refusal"),
        (assistant(refusal=5), "refusal"),
        ({**USER, "content": [{"type": "refusal", "refusal": "no"}]}, "content[0]"),
        ({**USER, "refusal": "no"}, "refusal"),
        ({**USER, "tool_calls": call()}, "tool_calls"),
        ({**USER, "tool_call_id": "call_1"}, "tool_call_id"),
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "tool", "tool_call_id": "call_1"}, "content"),
        ({"role": "function", "name": "weather", "content": "x"}, "role"),
    ],
)
def test_what_is_wrong_with_a_message_is_named(message: Json, param: str) -> None:
    with pytest.raises(ValueError, match=r"^messages") as caught:
        check_messages([USER, message])
    assert ApiError.of(caught.value).param == f"messages[1].{param}", str(caught.value)


SIGNS = {
    "hermes": "<tool_call>\n{{ call | tojson }}</tool_call>",
    "qwen3_coder": "<tool_call>\n<function={{ name }}>",
    "mistral": "[TOOL_CALLS]",
    "llama3_json": "<|python_tag|>",
    None: "{{ messages }}",
}


@pytest.mark.parametrize("name", SIGNS)
def test_a_parser_is_chosen_by_the_template(name: str | None) -> None:
    assert registry.tool_parser("auto", SIGNS[name])[0] == name
    assert registry.tool_parser("none", SIGNS[name])[0] is None
    assert registry.tool_parser("hermes", SIGNS[name])[0] == "hermes"


def test_llamas_other_template_is_known() -> None:
    template = "{{- '<|start_header_id|>ipython<|end_header_id|>' }}"
    assert registry.tool_parser("auto", template)[0] == "llama3_json"


def test_a_reasoning_parser_is_chosen_by_the_template() -> None:
    templates = ("{{ x.split('</think>') }}", "<\uff5cAssistant\uff5c> </think>", "{{ x }}", None)
    chosen = [registry.reasoning_parser("auto", template)[0] for template in templates]
    assert [parser and parser.name for parser in chosen] == ["qwen3", "deepseek_r1", None, None]


def test_settings_have_the_parsers_that_there_are() -> None:
    for field, names in (
        ("tool_call_parser", registry.TOOL_PARSERS),
        ("reasoning_parser", registry.REASONING_PARSERS),
    ):
        kind = EngineConfig.model_fields[field].annotation
        assert set(get_args(kind)) == {"auto", "none", *names}


def test_an_unknown_parser_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"tool_call_parser: 'x' is not known; there are .*hermes"):
        ChatStyle.of(None, "x", "auto")


def test_calls_that_nobody_understands_are_refused() -> None:
    use = read_tool_use([tool()], "auto", None)
    with pytest.raises(ValueError, match=r"tools: .*--tool-call-parser"):
        ChatStyle().check(use)
    ChatStyle(HermesParser).check(use)
    ChatStyle().check(read_tool_use([tool()], "required", None))


@pytest.mark.parametrize(
    ("parser", "prompt_end", "is_open"),
    [
        ("qwen3", "assistant\n", False),
        ("qwen3", "assistant\n<think>\n", True),
        ("qwen3", "assistant\n<think>\n\n</think>\n\n", False),
        ("deepseek_r1", "assistant\n", True),
        ("deepseek_r1", "<think>\n\n</think>\n\n", False),
    ],
)
def test_a_prompt_may_begin_the_thoughts(parser: str, prompt_end: str, is_open: bool) -> None:
    style = ChatStyle.of("", "none", parser)
    answers = style.answer_format(prompt_end=prompt_end)
    assert answers.is_open == is_open
    assert answers.read("a</think>b").content == ("b" if is_open else "a</think>b")


def test_a_held_answer_has_no_thoughts() -> None:
    style = ChatStyle.of("<think></think><tool_call>", "auto", "auto")
    use = read_tool_use([tool()], "required", None)
    assert not style.answer_format(use, prompt_end="<think>").thinks
    assert ChatStyle().answer_format() is PLAIN


def test_thoughts_are_left_out_where_they_are_not_wanted() -> None:
    style = ChatStyle.of("", "none", "qwen3")
    answers = style.answer_format(shows_thoughts=False)
    answer = answers.read("<think>a</think>b")
    assert (answer.reasoning, answer.content) == (None, "b")
