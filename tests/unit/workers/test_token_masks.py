"""Which tokens a grammar allows: the table of a tokenizer, masks on logits, and what is kept."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.byte_fallback import byte_fallback_tokenizer
from support.byte_llama import save_tiny_llama

from saqqara.cluster.structured.outputs import StructuredOutputs
from saqqara.workers.grammar import compiler
from saqqara.workers.grammar.compiler import Compiler
from saqqara.workers.grammar.masks import TokenMasks, unpack
from saqqara.workers.grammar.matchers import Matchers
from saqqara.workers.plan import Grammar

EOS = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes: token 0 ends a text, 1 to 256 are bytes."""
    path = tmp_path_factory.mktemp("bytes")
    save_tiny_llama(path)
    return path


def of_regex(expression: str, *, ignore_eos: bool = False, eos: int = EOS) -> Grammar:
    return Grammar(StructuredOutputs(regex=expression).text, (eos,), ignore_eos)


def allowed(matchers: Matchers, slot: int = 0, vocab_size: int = 257) -> list[int]:
    """The tokens that may come next in a slot."""
    masks, errors = matchers.masks([slot])
    assert not errors
    assert masks is not None
    return torch.isfinite(masks.apply(torch.zeros(1, vocab_size)))[0].nonzero()[:, 0].tolist()


def test_a_mask_follows_the_text(folder: Path) -> None:
    matchers = Matchers(Compiler(str(folder), 257))
    matchers.open(0, of_regex("ab*"), [])
    [a] = allowed(matchers)
    assert not matchers.advance(0, a)
    end, b = allowed(matchers)
    assert end == EOS
    assert not matchers.advance(0, b)
    assert matchers.advance(0, EOS)
    assert matchers.masks([0]) == (None, {})  # it has ended


def test_known_tokens_lead_to_the_same_place(folder: Path) -> None:
    matchers = Matchers(Compiler(str(folder), 257))
    grammar = of_regex("[a-c]x[d-f]y?")
    matchers.open(0, grammar, [])
    known: list[int] = []
    for _ in range(4):
        matchers.open(1, grammar, known)
        assert allowed(matchers, 1) == allowed(matchers, 0)
        known.append(allowed(matchers)[-1])
        matchers.advance(0, known[-1])
    with pytest.raises(ValueError, match="the known tokens do not match"):
        matchers.open(2, grammar, known[1:])


def test_a_token_that_is_not_allowed_is_refused(folder: Path) -> None:
    matchers = Matchers(Compiler(str(folder), 257))
    matchers.open(0, of_regex("a"), [])
    with pytest.raises(ValueError, match="doesn't satisfy the grammar"):
        matchers.advance(0, 5)
    matchers.close(0)
    assert not matchers.advance(0, 5)


def test_ignoring_the_end_leaves_it_where_nothing_else_is(folder: Path) -> None:
    matchers = Matchers(Compiler(str(folder), 257))
    matchers.open(0, of_regex("a*"), [])
    matchers.open(1, of_regex("a*", ignore_eos=True), [])
    assert EOS in allowed(matchers, 0)
    assert allowed(matchers, 1) == allowed(matchers, 0)[1:]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_without_a_grammar_are_left_alone(folder: Path, num_threads: int) -> None:
    matchers = Matchers(Compiler(str(folder), 257), num_threads)
    for slot in (3, 5):
        matchers.open(slot, of_regex("[a-e]" if slot == 3 else "."), [])
    masks, _ = matchers.masks([5, 1, 3])
    assert masks is not None
    assert masks.rows == (0, 2)
    logits = torch.randn(3, 257)
    before = logits.clone()
    masked = masks.apply(logits)
    assert torch.equal(logits, before)
    assert torch.equal(masked[1], logits[1])
    assert torch.isfinite(masked[2]).sum() == 5
    for row in range(3):
        one = masks.of(row)
        assert (one is None) == (row == 1)
        if one is not None:
            assert torch.equal(one.apply(logits[row, None])[0], masked[row])


def test_bits_are_unpacked_on_a_device_as_on_the_host() -> None:
    words = np.random.default_rng(0).integers(-(2**31), 2**31, (3, 9), dtype=np.int32)
    logits = torch.zeros(3, 270)
    octets = torch.from_numpy(words.view(np.uint8))
    expected = torch.isfinite(TokenMasks((0, 1, 2), words).apply(logits))
    assert torch.equal(unpack(octets, 270), expected)


def test_a_vocabulary_may_be_larger_than_the_tokenizers(folder: Path) -> None:
    matchers = Matchers(Compiler(str(folder), 300))
    matchers.open(0, of_regex("(?s:.*)"), [])
    assert 128 < max(allowed(matchers, vocab_size=300)) < 257  # bytes that may begin a character


def test_a_vocabulary_may_be_smaller(folder: Path) -> None:
    matchers = Matchers(Compiler(str(folder), 200))
    matchers.open(0, of_regex("(?s:.*)"), [])
    assert 128 < max(allowed(matchers, vocab_size=200)) < 200


def test_bytes_that_tokens_spell_by_fallback(tmp_path: Path) -> None:
    """Llama 2's kind: a `é` is a token, a `ü` two bytes, a space a letter of its own."""
    tokenizer = byte_fallback_tokenizer()
    tokenizer.backend.save_pretrained(tmp_path)
    size = tokenizer.vocab_size
    matchers = Matchers(Compiler(str(tmp_path), size))
    matchers.open(0, of_regex("[éü] world!", eos=2), [])
    names = tokenizer.backend.convert_ids_to_tokens
    assert sorted(names(allowed(matchers, vocab_size=size))) == ["<0xC3>", "é"]
    ids = [tokenizer.backend.convert_tokens_to_ids("<0xC3>")]
    while not matchers.advance(0, ids[-1]):
        ids.append(allowed(matchers, vocab_size=size)[-1])
    assert tokenizer.decode(ids) in ("é world!", "ü world!")


def test_few_grammars_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MAX_GRAMMARS", 2)
    made = Compiler(str(folder), 257)
    for letter in "abca":
        made.compile(of_regex(letter))
        assert len(made._compiled) <= 2
    assert made._num_bytes == sum(len(text) for text, _ in made._compiled)


def test_what_cannot_be_compiled_says_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown name"):
        Compiler(str(folder), 257).compile(Grammar("start: gone", (EOS,)))
    with pytest.raises(ValueError, match="no table of tokens"):
        Compiler(str(tmp_path), 257).compile(of_regex("a"))
