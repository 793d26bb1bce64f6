"""A chat template is a foreign program: whatever it does costs the conversation alone."""

import inspect
import sys
from typing import Any

import pytest
from support.byte_llama import CHAT_TEMPLATE, save_tiny_llama
from transformers import PreTrainedTokenizerBase

from saqqara.cluster.chat import RESERVED_ARGS, ChatOptions
from saqqara.cluster.engine.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]
BEGUN = [*HELLO, {"role": "assistant", "content": "Well, "}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    save_tiny_llama(folder)
    return Tokenizer.load(folder)


def written(tokenizer: Tokenizer, messages: list[dict[str, str]], **options: Any) -> str:
    return tokenizer.decode(tokenizer.apply_chat(messages, ChatOptions(**options)))


def test_the_answer_is_begun_or_the_last_message_goes_on(tokenizer: Tokenizer) -> None:
    assert written(tokenizer, HELLO) == "user: Hello\nassistant: "
    assert written(tokenizer, HELLO, add_generation_prompt=False) == "user: Hello\n"
    assert (
        written(tokenizer, BEGUN, continue_final_message=True) == "user: Hello\nassistant: Well, "
    )
    with pytest.raises(ValueError, match=r"continue_final_message: .* add_generation_prompt"):
        ChatOptions(continue_final_message=True, add_generation_prompt=True)


def test_a_template_has_the_variables_it_is_given(tokenizer: Tokenizer) -> None:
    template = "{{ mood }} {{ messages[0].content }}"
    args = {"mood": "calm"}
    text = written(tokenizer, HELLO, chat_template=template, template_args=args)
    assert text == "calm Hello"


def test_an_effort_is_a_variable_of_templates_that_have_it(tokenizer: Tokenizer) -> None:
    template = "{{ reasoning_effort }} {{ enable_thinking }} {{ messages[0].content }}"
    assert written(tokenizer, HELLO, chat_template=template, reasoning_effort="high").startswith(
        "high "
    )
    text = written(tokenizer, HELLO, chat_template=template, reasoning_effort="none")
    assert text == " False Hello"
    assert written(tokenizer, HELLO, reasoning_effort="none") == written(tokenizer, HELLO)
    with pytest.raises(ValueError, match=r"reasoning_effort: .* has no such variable"):
        written(tokenizer, HELLO, reasoning_effort="low")


def test_tools_need_a_template_that_has_a_place_for_them(tokenizer: Tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert '"name": "f"' in written(
        tokenizer, HELLO, chat_template="{{ tools | tojson }} {{ messages }}", tools=[tool]
    )
    with pytest.raises(ValueError, match=r"tools: .* no place for them; .* --chat-template"):
        written(tokenizer, HELLO, tools=[tool])
    call = {"id": "a", "function": {"name": "f", "arguments": "{}"}}
    messages: Any = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls: .* --chat-template"):
        written(tokenizer, messages)


def test_settings_of_transformers_are_no_variables() -> None:
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    assert set(parameters) - {"kwargs"} <= RESERVED_ARGS
    for name in RESERVED_ARGS:
        with pytest.raises(ValueError, match=f"chat_template_kwargs: '{name}' is no variable"):
            ChatOptions(template_args={name: False})


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError"),
        ("{{ 1 / 0 }}", "fails: ZeroDivisionError: division by zero"),
        ("{{ nobody.home }}", "refuses: 'nobody' is undefined"),
        ("{% if %}", "refuses: Expected an expression"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails: RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails: OverflowError: Range too big"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "finds no end: it runs too many lines",
        ),
        (
            "{% for i in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}",
            "finds no end: it writes too much",
        ),
        (
            "{% for i in range(999) %}{{ range(99999)|map('abs')|list|length }}{% endfor %}",
            "finds no end: it makes too many calls",
        ),
    ],
)
def test_a_template_that_fails_costs_its_conversation(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    monkeypatch.setattr("saqqara.cluster.chat.template.MAX_CALLS", 50_000)
    before = sys.gettrace()
    with pytest.raises(ValueError, match=f"messages: the model's chat template {reason}"):
        tokenizer.apply_chat(HELLO, ChatOptions(chat_template=template))
    assert sys.gettrace() is before
    assert written(tokenizer, HELLO) == "user: Hello\nassistant: "


def test_the_bounds_grow_with_what_there_is_to_write(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("MAX_LINES", "MAX_CALLS", "MAX_CHARS"):
        monkeypatch.setattr(f"saqqara.cluster.chat.template.{bound}", 1000)
    many = [{"role": "user", "content": "x"}] * 300
    assert written(tokenizer, many).count("\n") == 300
    long = [{"role": "user", "content": "x" * 5000}]
    assert len(written(tokenizer, long, chat_template=CHAT_TEMPLATE * 2)) > 10_000
