"""Log-probabilities over real text: k entries stay k, bytes make the text, offsets point into it.

Answers are made of given tokens, by the code that makes every answer, for three kinds of tokenizer.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.byte_fallback import byte_fallback_tokenizer
from support.byte_llama import save_tiny_llama

from saqqara.cluster.engine.output import Choice
from saqqara.cluster.engine.tokenizer import BROKEN, Tokenizer
from saqqara.cluster.openai.replies import ChoiceProgress, ReplyHead, chunk_choice, full_reply
from saqqara.cluster.openai.shown import Shown
from saqqara.cluster.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.scheduling.events import NewToken
from saqqara.cluster.scheduling.sequence import Sequence as Answer
from saqqara.cluster.scheduling.sequence import TokenRequest
from saqqara.compression.retention import Retention
from saqqara.workers.plan import TokenLogprobs

CAMEL = "🐫🏜️ ünïcödé, 日本語のテキスト!"


@pytest.fixture(scope="module")
def single_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bytes")
    save_tiny_llama(folder)
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    return byte_fallback_tokenizer()


@pytest.fixture(scope="module")
def byte_level(demo_model: Path) -> Tokenizer:
    return Tokenizer.load(demo_model)


def steps(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    top: Callable[[int], Sequence[int]] = lambda token_id: (),
    stop_token: int | None = None,
    **sampling: Any,
) -> list[CompletionOutput]:
    """What there is of an answer after each of its tokens, and at its end."""
    params = SamplingParams(**{"logprobs": 5, "max_tokens": None, **sampling})
    request = TokenRequest("r", (1,), params, Retention())
    ends = frozenset(() if stop_token is None else (stop_token,))
    answer = Answer(request, 0, 0, params.spec(0), ends, frozenset(), len(ids))
    choice = Choice(answer, tokenizer)
    outputs = []
    for token_id in ids:
        if choice.matched is not None:
            break
        answer.output_token_ids.append(token_id)
        answer.finish_reason = "stop" if token_id == stop_token else None
        best = top(token_id)
        values = tuple(-1.0 - place for place in range(len(best)))
        rank = 1 + best.index(token_id) if token_id in best else len(best) + 1
        logprobs = TokenLogprobs(-float(rank), rank, tuple(best), values)
        choice.append(NewToken(answer, token_id, logprobs))
        outputs.append(choice.output())
    choice.end()
    answer.finish_reason = answer.finish_reason or "length"
    return [*outputs, choice.output()]


def head(*, is_chat: bool, num_logprobs: int = 5) -> ReplyHead:
    return ReplyHead("id", 0, "model", is_chat, Shown(num_logprobs=num_logprobs))


def whole(outputs: Sequence[CompletionOutput], **kind: Any) -> dict[str, Any]:
    """The choice of an answer that is not streamed."""
    request = RequestOutput("r", None, (1,), (outputs[-1],), True, RequestMetrics(0.0))
    reply = full_reply(head(**kind), [request])["choices"][0]
    return dict(json.loads(json.dumps(reply, allow_nan=False)))


def streamed(outputs: Sequence[CompletionOutput], **kind: Any) -> list[dict[str, Any]]:
    sent = ChoiceProgress()
    request = RequestOutput("r", None, (1,), (), False, RequestMetrics(0.0))
    events = (chunk_choice(head(**kind), 0, request, output, sent) for output in outputs)
    return [event for event in events if event is not None]


def check(tokenizer: Tokenizer, ids: Sequence[int], **sampling: Any) -> None:
    """All that must hold of an answer that no stop string cuts."""
    outputs = steps(tokenizer, ids, **sampling)
    text = outputs[-1].text
    content = whole(outputs, is_chat=True)["logprobs"]["content"]
    data = b"".join(bytes(token["bytes"]) for token in content)
    assert data.decode(errors="replace") == text
    logprobs = whole(outputs, is_chat=False)["logprobs"]
    events = [e["logprobs"] for e in streamed(outputs, is_chat=False) if e["logprobs"]]
    for name in ("tokens", "text_offset", "top_logprobs"):
        assert [one for event in events for one in event[name]] == logprobs[name]
    for token, offset, entry in zip(
        logprobs["tokens"], logprobs["text_offset"], content, strict=True
    ):
        if entry["bytes"] and not token.startswith(("bytes:", "<")):
            assert text[offset:].startswith(token)


@pytest.mark.model
@given(ids=st.lists(st.integers(0, 49151), max_size=20), text=st.text(max_size=12))
@settings(max_examples=60, deadline=None)
def test_bytes_and_offsets_of_byte_level_tokens(
    byte_level: Tokenizer, ids: list[int], text: str
) -> None:
    check(byte_level, ids)
    check(byte_level, byte_level.encode(text) + ids)
    check(byte_level, ids, skip_special_tokens=False)


@given(data=st.binary(max_size=12), text=st.text(max_size=12))
@example(data=b"\xed\xa0\x00", text="")  # half a surrogate is two characters, U+FFFD
@settings(max_examples=60, deadline=None)
def test_bytes_and_offsets_of_single_bytes(single_bytes: Tokenizer, data: bytes, text: str) -> None:
    check(single_bytes, single_bytes.encode(text))
    every = {single_bytes.token_bytes(i)[0]: i for i in range(1, 257)}
    check(single_bytes, [every[byte] for byte in data])


@given(text=st.text(st.sampled_from("Hello world!é日🐫 ▁"), max_size=12))
@settings(max_examples=60, deadline=None)
def test_bytes_and_offsets_of_byte_fallback(byte_fallback: Tokenizer, text: str) -> None:
    check(byte_fallback, byte_fallback.encode(text))
    check(byte_fallback, byte_fallback.encode(text, add_special_tokens=False))


def test_parts_of_a_character_are_told_apart(single_bytes: Tokenizer) -> None:
    """Three tokens of `日`, each beside four others that are no character alone."""
    ids = single_bytes.encode("日x")
    part = single_bytes.encode("日本語のテキスト")
    tops = {token: [token, *[t for t in dict.fromkeys(part) if t != token][:4]] for token in ids}
    outputs = steps(single_bytes, ids, top=tops.__getitem__)
    logprobs = whole(outputs, is_chat=False)["logprobs"]
    assert logprobs["tokens"] == [r"bytes:\xe6", r"bytes:\x97", r"bytes:\xa5", "x"]
    assert logprobs["text_offset"] == [0, 0, 0, 1]
    assert [len(best) for best in logprobs["top_logprobs"]] == [5] * 4
    for token, best in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert best[token] == -1.0
    content = whole(outputs, is_chat=True)["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xE6], [0x97], [0xA5], [0x78]]
    assert {len(entry["top_logprobs"]) for entry in content} == {5}


def test_tokens_with_the_same_text_keep_their_entries(byte_fallback: Tokenizer) -> None:
    """`!` is a word and a byte; the less likely goes by its id."""
    word, byte = byte_fallback.encode("!", add_special_tokens=False)[-1], 8 + ord("!")
    outputs = steps(byte_fallback, [word, byte], top=lambda _: (word, byte))
    logprobs = whole(outputs, is_chat=False)["logprobs"]
    assert logprobs["top_logprobs"][0] == {"!": -1.0, f"token_id:{byte}": -2.0}
    assert logprobs["top_logprobs"][1] == {f"token_id:{word}": -1.0, "!": -2.0}
    assert logprobs["tokens"] == ["!", "!"]


@pytest.mark.parametrize("count", [0, 2])
def test_completions_always_show_the_sampled_token(single_bytes: Tokenizer, count: int) -> None:
    [sampled] = single_bytes.encode("z")
    best = single_bytes.encode("ab")[:count]
    outputs = steps(single_bytes, [sampled], top=lambda _: best, logprobs=count)
    shown = whole(outputs, is_chat=False, num_logprobs=count)["logprobs"]["top_logprobs"]
    assert list(shown[0]) == [*["a", "b"][:count], "z"]
    listed = whole(outputs, is_chat=True, num_logprobs=count)["logprobs"]["content"][0]
    assert [token["token"] for token in listed["top_logprobs"]] == ["a", "b"][:count]


def test_what_ends_an_answer_is_no_part_of_its_text(single_bytes: Tokenizer) -> None:
    ids = [*single_bytes.encode("ab"), 0]
    content = whole(steps(single_bytes, ids), is_chat=True)["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in content] == [
        ("a", [97]),
        ("b", [98]),
        ("<eos>", []),
    ]
    shown = steps(single_bytes, ids, skip_special_tokens=False)
    assert whole(shown, is_chat=True)["logprobs"]["content"][2]["bytes"] == list(b"<eos>")
    stopped = steps(single_bytes, single_bytes.encode("abc"), stop_token=ids[1])
    assert whole(stopped, is_chat=True)["logprobs"]["content"][1]["bytes"] == []


def test_a_stop_string_cuts_the_text_and_no_offset(single_bytes: Tokenizer) -> None:
    outputs = steps(single_bytes, single_bytes.encode("ab--c"), stop=["--"])
    answer = whole(outputs, is_chat=False)
    assert answer["text"] == "ab"
    assert answer["logprobs"]["text_offset"] == [0, 1, 2, 3]
    events = [e["logprobs"] for e in streamed(outputs, is_chat=False) if e["logprobs"]]
    assert [offset for event in events for offset in event["text_offset"]] == [0, 1, 2, 3]


def test_no_text_without_detokenizing(single_bytes: Tokenizer) -> None:
    ids = single_bytes.encode("abc")
    last = steps(single_bytes, ids, detokenize=False)[-1]
    assert (last.text, last.token_ids) == ("", tuple(ids))


def test_an_impossible_token_has_a_finite_number(single_bytes: Tokenizer) -> None:
    last = steps(single_bytes, single_bytes.encode("a"))[-1]
    entry = {1: Logprob(-1.0, 1, "a", b"a"), 2: Logprob(-math.inf, 2, "b", b"b")}
    answer = whole([replace(last, logprobs=(entry,))], is_chat=False)
    assert answer["logprobs"]["top_logprobs"] == [{"a": -1.0, "b": -9999.0}]


@pytest.mark.model
def test_the_real_tokenizer_splits_characters(byte_level: Tokenizer) -> None:
    """So that the property above is about something."""
    ids = byte_level.encode(CAMEL)
    logprobs = whole(steps(byte_level, ids), is_chat=False)["logprobs"]
    assert sum(token.startswith("bytes:") for token in logprobs["tokens"]) > 5
    assert not any(BROKEN in token for token in logprobs["tokens"])
    check(byte_level, ids)
