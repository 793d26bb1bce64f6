"""A growing answer becomes thoughts, content and tool calls, however its text is cut.

The oracle of the property is the whole text read at once; what is right for a text is in
`CASES`.
"""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saqqara.cluster.openai.formats.call_parser import CallParser
from saqqara.cluster.openai.formats.deltas import AnswerDelta
from saqqara.cluster.openai.formats.forced import NamedParser, RequiredParser
from saqqara.cluster.openai.formats.json_text import JsonText
from saqqara.cluster.openai.tools.reader import AnswerFormat, AnswerReader, ParserType
from saqqara.cluster.openai.tools.registry import tool_parser_type

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"type": ["string", "null"]},
        "exact": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "places": {"type": "array"},
    },
}
TOOLS: dict[str, Any] = {"weather": CITY, "time": {}}
PARSERS: dict[str, ParserType | None] = {
    **{n: tool_parser_type(n) for n in ("hermes", "llama3_json", "mistral", "qwen3_coder")},
    "required": RequiredParser,
    "named": NamedParser,
    "none": None,
}


@dataclass(frozen=True)
class Read:
    """What an answer says; calls are names and arguments."""

    content: str | None = None
    calls: tuple[tuple[str, str], ...] = ()
    reasoning: str | None = None


PARIS = '{"city": "Paris"}'
NOON = '{"at": [12, null, -0.5e3]}'
WEATHER = f'{{"name": "weather", "arguments": {PARIS}}}'
TIME = f'{{"arguments": {NOON}, "name": "time"}}'
LLAMA = WEATHER.replace("arguments", "parameters")
XML = "<function=weather>\n<parameter=city>\nParis\n</parameter>\n"
TWO = (("weather", PARIS), ("time", NOON))
ONE = (("weather", PARIS),)

CASES: dict[str, list[tuple[str, Read]]] = {
    "hermes": [
        ("Hello.", Read("Hello.")),
        (f"<tool_call>\n{WEATHER}\n</tool_call>", Read(None, ONE)),
        (f"I look. \n<tool_call>{WEATHER}</tool_call>\n", Read("I look.", ONE)),
        (f"<tool_call>{WEATHER}</tool_call>\n<tool_call>{TIME}</tool_call>", Read(None, TWO)),
        (f"a <tool_call>{WEATHER}</tool_call> b ", Read("a b ", ONE)),
        # The closing marker is missing, or the object's last bracket.
        (f"<tool_call>{WEATHER}", Read(None, ONE)),
        (f"<tool_call>{WEATHER[:-1]}</tool_call>", Read(None, ONE)),
        ('<tool_call>{"name": "time"}</tool_call>', Read(None, (("time", "{}"),))),
        (
            '<tool_call>{"name": "time", "arguments": null}</tool_call>',
            Read(None, (("time", "{}"),)),
        ),
        (
            f'<tool_call>{{"name": "weather", "arguments": {json.dumps(PARIS)}}}</tool_call>',
            Read(None, ONE),
        ),
        # A line break in a string is mended, as JSON wants it.
        (
            '<tool_call>{"name": "time", "arguments": {"a": "x\ny"}}</tool_call>',
            Read(None, (("time", '{"a": "x\\ny"}'),)),
        ),
        # What is no call is content, as it is.
        *(
            (text, Read(text))
            for text in (
                "<tool_call>oh</tool_call>",
                "<tool_call> {'name': 'weather'}",
                '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
                '<tool_call>{"name": "a b", "arguments": {}}</tool_call>',
                '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
                '<tool_call>{"arguments": {}}</tool_call>',
                '<tool_call>{"name": "time", "arguments": 5}</tool_call>',
                '<tool_call>{"name": "time", "arguments": ' + "[" * 9999,
                '<tool_call>{"name": "wea',
                "text <tool_c and more ",
            )
        ),
        # One that breaks after it was announced stays; the answer ran into its bound.
        (f"<tool_call>{WEATHER[:-3]}", Read(None, (("weather", PARIS[:-2]),))),
        (
            '<tool_call>{"name": "time", "arguments": {"a": x}}',
            Read("x}}", (("time", '{"a": '),)),
        ),
    ],
    "llama3_json": [
        (LLAMA, Read(None, ONE)),
        (f"<|python_tag|>{LLAMA}", Read(None, ONE)),
        (f"{LLAMA}; {TIME}", Read(None, TWO)),
        (f"{LLAMA}\n{TIME}\n", Read(None, TWO)),
        (f"{LLAMA};", Read(None, ONE)),
        (f'\n{{"type": "function", {LLAMA[1:]}', Read(None, ONE)),
        (f"I look. <|python_tag|>{LLAMA}", Read("I look.", ONE)),
        *(
            (text, Read(text))
            for text in (
                '{"answer": 42}',
                '{"name": "nobody", "parameters": {}}',
                "<|python_tag|>print(1)",
                f"So: {LLAMA}",
                '{"name": "Ann", "age": 5}',
                " ; ",
            )
        ),
        (f'{LLAMA}; {{"name": 5}}', Read('; {"name": 5}', ONE)),
    ],
    "mistral": [
        (f"[TOOL_CALLS] [{WEATHER}, {TIME}]", Read(None, TWO)),
        (f"[TOOL_CALLS][{WEATHER}] and", Read("and", ONE)),
        (f"Well [TOOL_CALLS]weather[ARGS]{PARIS}", Read("Well", ONE)),
        (f"[TOOL_CALLS]weather{PARIS}[TOOL_CALLS]time[CALL_ID]a1[ARGS] {NOON}", Read(None, TWO)),
        *(
            (text, Read(text))
            for text in (
                "[TOOL_CALLS] oh no",
                "[TOOL_CALLS]",
                "[TOOL_CALLS]weather",
                "[TOOL_CALLS]weather[ARGS]",
                "[TOOL_CALLS]weather[CALL_ID]abc",
                "[TOOL_CALLS][5]",
                "[TOOL_CALLS]" + "x" * 300,
                "[TOOL",
            )
        ),
        (f"[TOOL_CALLS][{WEATHER}, 5]", Read(", 5]", ONE)),
    ],
    "qwen3_coder": [
        (f"<tool_call>\n{XML}</function>\n</tool_call>", Read(None, ONE)),
        (f"Sure.\n{XML}</function>", Read("Sure.", ONE)),
        (
            "<tool_call>\n<function=weather>\n<parameter=days>\n3\n</parameter>\n<parameter=unit>\n"
            "null\n</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=places>\n"
            '["a", 1]\n</parameter>\n</function>\n</tool_call>',
            Read(
                None,
                (("weather", '{"days": 3, "unit": null, "exact": true, "places": ["a", 1]}'),),
            ),
        ),
        (
            '<function=weather><parameter=city>\n\n"a"\n\n</parameter><parameter=days>soon'
            "</parameter><parameter=new>1</parameter></function>",
            Read(None, (("weather", '{"city": "\\n\\"a\\"\\n", "days": "soon", "new": "1"}'),)),
        ),
        ("<function=time>\n</function>\n</tool_call>", Read(None, (("time", "{}"),))),
        # Ends that are missing.
        (f"{XML.removesuffix('</parameter>' + chr(10))}</function>", Read(None, ONE)),
        (f"{XML}</tool_call>", Read(None, ONE)),
        (f"{XML} so", Read("so", ONE)),
        ("<function=weather>\n<parameter=city>\nPar", Read(None, (("weather", '{"city": "Par'),))),
        *(
            (text, Read(text))
            for text in (
                "<tool_call>oh",
                "<function=a b>",
                "<function=>",
                "<function=" + "x" * 300,
                "<function=wea",
            )
        ),
    ],
    "required": [
        (f"[{LLAMA}]", Read(None, ONE)),
        (f" [ {LLAMA} , {TIME} ] ", Read(None, TWO)),
        (f"[{LLAMA}, {{", Read(None, ONE)),
        (f"[{LLAMA[:-3]}", Read(None, (("weather", PARIS[:-2]),))),
        *((text, Read(text)) for text in ("[]", "", "no", '[{"name": "nobody"}]')),
    ],
    "named": [
        (PARIS, Read(None, ONE)),
        (f" {PARIS}\n", Read(None, ONE)),
        (PARIS[:-3], Read(None, (("weather", PARIS[:-3]),))),
        ("[]", Read("[]")),
    ],
    "none": [
        ("<tool_call>", Read("<tool_call>")),
        ("<think>\nhm\n</think>\n\nYes. ", Read("Yes. ", reasoning="hm")),
        (" <think>hm", Read(None, reasoning="hm")),
        ("<think>a</thi</think>", Read(None, reasoning="a</thi")),
        ("<think></think>Yes", Read("Yes")),
        ("Yes <think>", Read("Yes <think>")),
        (" <thin", Read(" <thin")),
        ("", Read("")),
    ],
}
FLAT = [(name, text, read) for name, cases in CASES.items() for text, read in cases]


def answer_format(name: str, *, is_open: bool = False) -> AnswerFormat:
    tools = {"weather": CITY} if name == "named" else TOOLS
    return AnswerFormat(PARSERS[name], tools, thinks=True, is_open=is_open)


def whole(name: str, text: str) -> Read:
    answer = answer_format(name).read(text)
    calls = tuple((call.name, call.arguments) for call in answer.calls)
    return Read(answer.content, calls, answer.reasoning)


def deltas(answer_format: AnswerFormat, pieces: list[str]) -> list[AnswerDelta]:
    """What a stream of an answer gives out; the last piece comes with its end."""
    reader, text, found = AnswerReader(answer_format), "", []
    for piece in pieces[:-1]:
        text += piece
        found.append(reader.read(text, is_finished=False))
    return [*found, reader.read(text + pieces[-1], is_finished=True)]


def joined(found: list[AnswerDelta]) -> Read:
    """What deltas add up to, as a client adds them."""
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for delta in found:
        for call in delta.calls:
            assert (call.id is None) == (call.name is None) == (call.index in names)
            names.setdefault(call.index, call.name or "")
            arguments[call.index] = arguments.get(call.index, "") + call.arguments
    assert list(names) == list(range(len(names)))
    content = "".join(delta.content for delta in found)
    reasoning = "".join(delta.reasoning for delta in found)
    calls = tuple((name, arguments[index]) for index, name in names.items())
    return Read(content, calls, reasoning)


def same(streamed: Read, read: Read) -> bool:
    """Whether two are equal, but for what is empty."""
    return (streamed.content, streamed.calls, streamed.reasoning) == (
        read.content or "",
        read.calls,
        read.reasoning or "",
    )


@pytest.mark.parametrize(("name", "text", "read"), FLAT, ids=[f"{n} {t:.40}" for n, t, _ in FLAT])
def test_an_answer_is_read(name: str, text: str, read: Read) -> None:
    assert whole(name, text) == read
    assert same(joined(deltas(answer_format(name), list(text) or [""])), read)


@pytest.mark.parametrize("name", PARSERS)
def test_thoughts_come_before_calls(name: str) -> None:
    for text, read in CASES[name]:
        if read.reasoning is None and name != "none":
            thought = whole(name, f"<think>\nhm\n</think>{text}")
            assert thought == Read((read.content or "").lstrip() or None, read.calls, "hm")


PIECES = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"),
    *("<think>", "</think>", "<function=", "weather", "time", ">", "<parameter=city>", "\n", " "),
    *("</parameter>", "</function>", "{", "}", "[", "]", ",", ";", ":", '"', "\\", "\\u12", "é"),
    *('{"name": ', '"weather"', '"arguments": ', '"parameters": ', "12", "-0.5", "null", "tr"),
    *(WEATHER, LLAMA, TIME, XML, PARIS, "plain words"),
]


@st.composite
def cut_texts(draw: st.DrawFn) -> list[str]:
    """Texts made of what the formats are made of, cut anywhere."""
    text = "".join(draw(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=12)))
    places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=30)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=80)
@given(pieces=cut_texts(), is_open=st.booleans())
def test_how_a_text_is_cut_changes_nothing(name: str, pieces: list[str], is_open: bool) -> None:
    kind = answer_format(name, is_open=is_open)
    read = kind.read("".join(pieces))
    calls = tuple((call.name, call.arguments) for call in read.calls)
    assert same(joined(deltas(kind, pieces)), Read(read.content, calls, read.reasoning))
    if not read.calls and read.reasoning is None and not is_open:
        text = "".join(pieces)  # nothing is lost of a text without calls
        assert read.content == text or "<think>" in text


def test_content_comes_as_soon_as_it_is_certain() -> None:
    found = deltas(answer_format("hermes"), ["I ", "look<", "b> <tool", "_", "x"])
    assert [delta.content for delta in found] == ["I", " look", "<b>", "", " <tool_x"]


def test_arguments_come_as_they_are_written() -> None:
    pieces = ['<tool_call>{"name": "time", "arguments": ', '{"a"', ': "b', 'c"', "}", "}"]
    found = deltas(answer_format("hermes"), pieces)
    assert [[c.arguments for c in d.calls] for d in found] == [
        *([], ['{"a"'], [': "b'], ['c"'], ["}"], [])
    ]
    assert [c.name for d in found for c in d.calls] == ["time", None, None, None]


def test_later_calls_are_left_out_where_one_is_wanted() -> None:
    kind = AnswerFormat(PARSERS["hermes"], TOOLS, max_calls=1)
    text = f"<tool_call>{WEATHER}</tool_call><tool_call>{TIME}</tool_call>"
    assert [call.name for call in kind.read(text).calls] == ["weather"]


def test_ids_are_such_as_templates_take() -> None:
    ids = [
        kind.read(text).calls[0].id
        for kind, text in (
            (answer_format("hermes"), f"<tool_call>{WEATHER}"),
            (answer_format("mistral"), f"[TOOL_CALLS][{WEATHER}]"),
        )
    ]
    assert ids[0].startswith("call_")
    assert len(ids[1]) == 9
    assert ids[1].isalnum()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100)
@given(value=JSON, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_every_json_value_is_read(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    reader = JsonText()
    assert reader.feed(text + ";") == len(text)
    assert (reader.state, reader.take()) == ("done", text)


@settings(max_examples=150)
@given(text=st.text(alphabet='{}[]",:\\u0123eE+-.truefalsn \n', max_size=30))
def test_a_json_value_is_done_where_pythons_reader_is(text: str) -> None:
    """The oracle is the standard library's reader, on texts of JSON's own characters."""
    reader = JsonText()
    end = reader.feed(text)
    reader.end()
    try:
        expected = json.JSONDecoder(strict=False).raw_decode(text)[1]
    except ValueError:
        assert reader.state == "broken"
        return
    if reader.state == "done":
        assert end == expected
    else:  # Python takes `1` of `1.` and `0` of `01`
        assert text[:expected].lstrip("-").isdigit() or "." in text or "e" in text.lower()


@pytest.mark.parametrize("name", [name for name in PARSERS if name != "none"])
def test_the_work_grows_with_the_text_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a parser leaves for the next piece is no longer than a marker or a name."""
    left: list[int] = []
    feed = CallParser.feed

    def note(parser: CallParser, text: str) -> None:
        feed(parser, text)
        left.append(len(parser._text))

    monkeypatch.setattr(CallParser, "feed", note)
    for text in (f"<tool_call>{' ' * 2000}", "x" * 2000, *(text for text, _ in CASES[name])):
        deltas(answer_format(name), list(f"{text}{' ' * 600}{'[TOOL_CALLS]<' * 200}") or [""])
    assert max(left) <= 300
