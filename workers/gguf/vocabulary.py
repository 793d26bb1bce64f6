"""From the vocabulary of a GGUF file to a fast tokenizer.

Two kinds are read: byte-level BPE (`gpt2`), whose file names its pre-tokenizer, and SentencePiece's
BPE (`llama`), which has scores in place of merges.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .file import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_SPACE = "\u2581"  # SentencePiece's sign for one
# Before the bytes of a word are joined, a text is cut into words: one expression per name.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS: dict[str, str | None] = {
    "gpt-2": None,  # the byte level's own
    "smollm": None,  # after digits have been split off one by one
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "qwen2": _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"),
}
_IGNORE_MERGES = {"llama-bpe", "llama3"}  # a word that is a token is not put together
_DIGITS_ALONE = {"smollm"}
_NFC = {"qwen2"}


def make_tokenizer(file: GgufFile) -> "PreTrainedTokenizerFast":
    """The tokenizer of a file, as transformers loads it from a folder.

    Raises:
        ValueError: it is of another kind, or splits words in a way that is not known; names the
            field.
    """
    from transformers import PreTrainedTokenizerFast

    kind = file.field("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise ValueError(
            f"GGUF: tokenizer.ggml.model is {kind!r}; those read are {', '.join(_KINDS)}"
        )
    tokens = _tokens(file)
    backend = _KINDS[kind](file, tokens)
    _add_tokens(file, backend, tokens)
    _add_ends(file, backend, tokens)
    architecture = file.field("general.architecture")
    template = file.fields.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{f"{name}_token": token for name, token in _named(file, tokens).items()},
        **({} if template is None else {"chat_template": template}),
        model_max_length=file.field(f"{architecture}.context_length"),
        clean_up_tokenization_spaces=False,
    )


def _tokens(file: GgufFile) -> list[str]:
    """By number; llama.cpp writes SentencePiece's user-defined pieces with plain spaces."""
    from gguf import TokenType

    tokens: list[str] = file.field("tokenizer.ggml.tokens")
    if file.field("tokenizer.ggml.model") != "llama":
        return tokens
    return [
        token.replace(" ", _SPACE) if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, _kinds(file, tokens), strict=True)
    ]


def _flag(file: GgufFile, name: str, default: bool) -> bool:
    return bool(file.fields.get(f"tokenizer.ggml.{name}", default))


def _named(file: GgufFile, tokens: list[str]) -> dict[str, str]:
    """Tokens that have a part of their own: transformers' name of it -> the token."""
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {}
    for name, key in keys.items():
        number = file.fields.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if not 0 <= number < len(tokens):
            raise ValueError(
                f"GGUF: tokenizer.ggml.{key}_token_id is {number}; there are {len(tokens)} tokens"
            )
        found[name] = tokens[number]
    return found


def _byte_level(file: GgufFile, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = file.field("tokenizer.ggml.pre")
    if name not in _WORDS:
        raise ValueError(
            f"GGUF: tokenizer.ggml.pre is {name!r}; those read are {', '.join(_WORDS)}"
        )
    merges = [tuple(pair.split(" ")) for pair in file.field("tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name in _IGNORE_MERGES))
    if name in _NFC:
        backend.normalizer = normalizers.NFC()
    words = _WORDS[name]
    rules: list[Any] = []
    if name in _DIGITS_ALONE:
        rules.append(pre_tokenizers.Digits(individual_digits=True))
    if words is not None:
        rules.append(pre_tokenizers.Split(Regex(words), "isolated"))
    rules.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(rules)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentence_pieces(file: GgufFile, tokens: list[str]) -> "Tokenizer":
    """A text is one word, spaces are a sign, and what no token spells is given as bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    if _flag(file, "remove_extra_whitespaces", False):
        raise ValueError(
            "GGUF: tokenizer.ggml.remove_extra_whitespaces is True; only False is read"
        )
    kinds = _kinds(file, tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(tokens, kinds, file.field("tokenizer.ggml.scores")),
            unk_token=_named(file, tokens).get("unk"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(file, "add_space_prefix", True)
    first = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", _SPACE)])
    last = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return backend


def _merges(tokens: list[str], kinds: list[int], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a token, best first.

    SentencePiece joins the neighbours whose whole has the best score, the first of equals; ranks of
    merges say the same. Pieces of other kinds (bytes, control, the user's own) are never joined.
    """
    from gguf import TokenType

    numbers = {token: i for i, token in enumerate(tokens) if kinds[i] == TokenType.NORMAL and token}
    found = []
    for whole, i in numbers.items():
        for cut in range(1, len(whole)):
            left, right = numbers.get(whole[:cut]), numbers.get(whole[cut:])
            if left is not None and right is not None:
                found.append((-scores[i], i, left, right))
    found.sort()
    return [(tokens[left], tokens[right]) for _, _, left, right in found]


def _kinds(file: GgufFile, tokens: list[str]) -> list[int]:
    kinds: list[int] = file.field("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise ValueError(
            f"GGUF: tokenizer.ggml.token_type has {len(kinds)} entries for {len(tokens)} tokens"
        )
    return kinds


def _add_tokens(file: GgufFile, backend: "Tokenizer", tokens: list[str]) -> None:
    """Control tokens are found in a text as they are; the user's own as the model spells spaces.

    With a space before every text the user's own would get one, too, so they are found as they are.
    """
    from gguf import TokenType
    from tokenizers import AddedToken

    pieces = file.field("tokenizer.ggml.model") == "llama"
    prefix = pieces and _flag(file, "add_space_prefix", True)
    special, own = [], []
    for token, kind in zip(tokens, _kinds(file, tokens), strict=True):
        if kind == TokenType.CONTROL:
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == TokenType.USER_DEFINED:
            if prefix and _SPACE in token:
                raise ValueError(
                    f"GGUF: tokenizer.ggml.tokens has the user-defined {token!r}: with "
                    "tokenizer.ggml.add_space_prefix, those with spaces are not read"
                )
            own.append(AddedToken(token, normalized=not prefix, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(own)


def _add_ends(file: GgufFile, backend: "Tokenizer", tokens: list[str]) -> None:
    """What a text begins and ends with when it is encoded."""
    from tokenizers import processors

    sentence_pieces = file.field("tokenizer.ggml.model") == "llama"
    named = _named(file, tokens)
    before = ["bos"] if _flag(file, "add_bos_token", sentence_pieces) else []
    after = ["eos"] if _flag(file, "add_eos_token", False) else []
    for name in (*before, *after):
        if name not in named:
            raise ValueError(f"GGUF: it has no field 'tokenizer.ggml.{name}_token_id'")
    if not before and not after:
        return
    ends = [named[name] for name in (*before, *after)]
    backend.post_processor = processors.TemplateProcessing(
        single=[*(named[name] for name in before), "$A", *(named[name] for name in after)],
        special_tokens=[(token, tokens.index(token)) for token in ends],
    )


_KINDS: dict[str, Callable[[GgufFile, list[str]], "Tokenizer"]] = {
    "gpt2": _byte_level,
    "llama": _sentence_pieces,
}
