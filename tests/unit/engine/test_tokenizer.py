"""The tokenizer turns text into the ids a model was trained on, and its ids back into text.

All tests use a real tokenizer; the tokenizers of other kinds are built from scratch.
"""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.byte_fallback import byte_fallback_tokenizer

from saqqara.cluster.chat import check_messages
from saqqara.cluster.engine.tokenizer import BROKEN, IncrementalDetokenizer, StopChecker, Tokenizer

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer(demo_model: Path) -> Tokenizer:
    return Tokenizer.load(demo_model)


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    return byte_fallback_tokenizer()


def stream(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
    return [*(detokenizer.append(token_id) for token_id in ids), detokenizer.flush()]


# --- Tokenizer ---


def test_a_prompt_becomes_ids_and_text_again(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Saqqara has 11 pyramids.")
    assert tokenizer.decode(ids) == "Saqqara has 11 pyramids."
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


def test_half_of_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"half of a surrogate pair.*at character 2"):
        tokenizer.encode("ab\ud800")


def test_facts_about_the_demo_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert {0, 1, 2} <= tokenizer.special_token_ids


def test_plain_prompts_get_bos_only_where_the_tokenizer_adds_it(
    tokenizer: Tokenizer, byte_fallback: Tokenizer
) -> None:
    assert tokenizer.encode("hi")[0] != tokenizer.bos_token_id  # as SmolLM2 was trained
    assert byte_fallback.encode("é")[0] == byte_fallback.bos_token_id
    assert 1 not in byte_fallback.encode("é", add_special_tokens=False)


def test_chat_follows_the_template_of_the_model(tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(tokenizer.apply_chat(HELLO), skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_chat_with_a_system_message_has_no_default_one(tokenizer: Tokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    text = tokenizer.decode(tokenizer.apply_chat(messages), skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello")


def test_text_parts_are_joined_by_line_breaks(tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert tokenizer.apply_chat([{"role": "user", "content": parts}]) == tokenizer.apply_chat(
        [{"role": "user", "content": "one\ntwo"}]
    )


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ("Hello", r"messages must be a list"),
        ({"role": "user", "content": "x"}, r"messages must be a list"),
        ([], r"messages is empty"),
        (["Hello"], r"messages\[0\] must be a mapping"),
        ([*HELLO, {"content": "x"}], r"messages\[1\]\.role is missing"),
        ([*HELLO, {"role": "user"}], r"messages\[1\]\.content is missing"),
        ([{"role": "", "content": "x"}], r"messages\[0\]\.role must be"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\.role must be"),
        ([*HELLO, *HELLO, {"role": "user", "content": None}], r"messages\[2\]\.content must be"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\] must be"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\.content\[0\] must be .* not of type 'image_url'",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            r"messages\[0\]\.content\[0\]\.text must be a string",
        ),
        (
            [{"role": "user", "content": "x", "tool_calls": [{}]}],
            r"messages\[0\]\.tool_calls is not supported",
        ),
    ],
)
def test_malformed_messages_name_the_field(messages: Any, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        check_messages(messages)


def test_unset_fields_of_clients_are_ignored() -> None:
    message: dict[str, Any] = {"role": "assistant", "content": "x", "refusal": None}
    message |= {"tool_calls": [], "name": None}
    assert check_messages([message]) == [{"role": "assistant", "content": "x"}]


def test_a_model_without_chat_template_says_so(byte_fallback: Tokenizer) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        byte_fallback.apply_chat(HELLO)


def test_what_a_template_refuses_is_a_value_error(demo_model: Path) -> None:
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(demo_model)
    backend.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="chat template refuses: roles must alternate"):
        Tokenizer(backend).apply_chat(HELLO)


def test_a_missing_tokenizer_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer: there is no folder") as caught:
        Tokenizer.load(tmp_path / "nothing")
    assert str(tmp_path / "nothing") in str(caught.value)
    with pytest.raises(ValueError, match=r"has no tokenizer \(tokenizer\.json\); give the folder"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer: cannot load"):
        Tokenizer.load(tmp_path)


# --- IncrementalDetokenizer ---


def test_a_character_of_several_tokens_comes_out_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a 😀!")
    pieces = stream(tokenizer, ids)
    assert len(ids) > 3
    assert "".join(pieces) == "a 😀!"
    assert all(BROKEN not in piece for piece in pieces)


@given(text=st.text(max_size=200))
def test_pieces_add_up_and_are_never_broken(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    decoded = tokenizer.decode(ids)
    assert "".join(pieces) == decoded
    if BROKEN not in decoded:
        assert all(BROKEN not in piece for piece in pieces)


@given(data=st.data(), skip=st.booleans())
def test_any_tokens_at_all_add_up(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    """Models may sample any bytes: half characters, lone continuations, special tokens."""
    partial = [i for i in range(300) if BROKEN in tokenizer.token_text(i)]
    any_id = st.one_of(
        st.sampled_from(partial), st.integers(0, 40), st.integers(0, tokenizer.vocab_size - 1)
    )
    ids = data.draw(st.lists(any_id, max_size=120))
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


def test_endless_broken_bytes_flow_on_in_a_bounded_window(tokenizer: Tokenizer) -> None:
    broken = [i for i in range(300) if tokenizer.token_text(i) == BROKEN]
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = random.Random(0).choices(broken, k=2000)
    text = ""
    for token_id in ids:
        text += detokenizer.append(token_id)
        assert len(detokenizer._window) < 64
    assert len(text) > 500
    assert text + detokenizer.flush() == tokenizer.decode(ids)


def test_tokens_that_end_one_character_and_begin_the_next_are_not_held(
    tokenizer: Tokenizer,
) -> None:
    """Such tokens leave every text unfinished; what is complete in it comes out all the same."""
    straddling = [
        i
        for i in range(tokenizer.vocab_size)
        if len(text := tokenizer.token_text(i)) > 1 and text[0] == text[-1] == BROKEN
    ]
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = random.Random(0).choices(straddling, k=500)
    text = ""
    for token_id in ids:
        text += detokenizer.append(token_id)
        assert len(detokenizer._window) < 64
    assert len(text) > 400
    assert text + detokenizer.flush() == tokenizer.decode(ids)


def test_a_long_text_needs_a_short_window(tokenizer: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer)
    for token_id in tokenizer.encode("The step pyramid of Djoser. " * 200):
        assert detokenizer.append(token_id) != ""  # plain words are never held back
        assert len(detokenizer._window) <= 17


def test_spaces_survive_where_a_tokenizer_strips_the_first(byte_fallback: Tokenizer) -> None:
    ids = [3, 4, 5, 3, 7] * 20
    pieces = stream(byte_fallback, ids)
    assert "".join(pieces) == byte_fallback.decode(ids)
    assert "".join(pieces).startswith("Hello world! Helloé Hello world!")


@given(text=st.text(max_size=60))
def test_byte_fallback_text_adds_up(byte_fallback: Tokenizer, text: str) -> None:
    ids = byte_fallback.encode(text)
    pieces = stream(byte_fallback, ids)
    assert "".join(pieces) == byte_fallback.decode(ids)
    if BROKEN not in text:
        assert all(BROKEN not in piece for piece in pieces)


def test_byte_fallback_keeps_a_long_row_of_emoji_whole(byte_fallback: Tokenizer) -> None:
    """Its decoder voids a row of bytes that starts inside a character, so the window must not."""
    text = "😀é\x80" * 50
    pieces = stream(byte_fallback, byte_fallback.encode(text))
    assert "".join(pieces) == text
    assert BROKEN not in "".join(pieces)


def test_special_tokens_are_shown_when_asked(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("bye"), 2]
    assert "".join(stream(tokenizer, ids)) == "bye"
    assert "".join(stream(tokenizer, ids, skip_special_tokens=False)) == "bye<|im_end|>"


# --- StopChecker ---


def run_checker(checker: StopChecker, pieces: list[str]) -> str:
    out = ""
    for piece in pieces:
        out += checker.append(piece)
        if checker.matched is not None:
            return out
    return out + checker.flush()


def test_text_ends_before_the_stop_string() -> None:
    checker = StopChecker(["\nUser:"])
    assert checker.append("Hi.") == "Hi."
    assert checker.append("\nUs") == ""  # may become the stop string
    assert checker.append("er: next") == ""
    assert checker.matched == "\nUser:"
    assert checker.append("more") == ""


def test_held_text_goes_out_when_it_was_no_stop_string() -> None:
    checker = StopChecker(["\nUser:"])
    assert checker.append("Hi.\nUs") == "Hi."
    assert checker.append("a") == "\nUsa"
    assert checker.append("\nUse") == ""
    assert checker.flush() == "\nUse"
    assert checker.matched is None


def test_the_stop_string_is_included_when_asked() -> None:
    checker = StopChecker(["END"], include_stop_str_in_output=True)
    assert run_checker(checker, ["one E", "ND two"]) == "one END"
    assert checker.matched == "END"


def test_without_stop_strings_nothing_is_held() -> None:
    checker = StopChecker()
    assert checker.append("anything") == "anything"
    assert checker.flush() == ""


def test_before_min_tokens_nothing_stops() -> None:
    checker = StopChecker(["ab"])
    assert checker.append("xab", can_stop=False) == "xab"
    assert checker.append("a") == ""
    assert checker.append("b", can_stop=False) == "ab"
    assert checker.append("b") == "b"


def test_an_empty_stop_string_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"stop\[1\] is empty"):
        StopChecker(["a", ""])


def first_stop(text: str, stop: list[str]) -> tuple[int, str] | None:
    """Where the text ends, found letter by letter; the oracle of the next test."""
    for end in range(1, len(text) + 1):
        complete = [string for string in stop if text[:end].endswith(string)]
        if complete:
            longest = max(complete, key=len)
            return end - len(longest), longest
    return None


@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
)
def test_the_result_does_not_depend_on_the_pieces(
    pieces: list[str], stop: list[str], include: bool
) -> None:
    checker = StopChecker(stop, include)
    text = "".join(pieces)
    out = run_checker(checker, pieces)
    expected = first_stop(text, stop)
    if expected is None:
        assert (out, checker.matched) == (text, None)
    else:
        start, string = expected
        assert checker.matched == string
        assert out == text[: start + len(string) * include]
