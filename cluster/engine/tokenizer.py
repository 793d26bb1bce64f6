"""Text to tokens and back: chat templates, encoding, incremental decoding, stop strings.

The way of one sequence: `Tokenizer.encode` or `apply_chat` gives its prompt; each generated token
goes through an `IncrementalDetokenizer`, whose text goes through a `StopChecker` to the caller.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from saqqara.cluster.chat import ChatOptions, check_messages, render_chat
from saqqara.workers.models.source import described_folder

from .token_bytes import TokenBytes

BROKEN = "\ufffd"  # what a decoder puts for bytes that are not (yet) a character
UNFINISHED = 3  # a character has at most 4 bytes, so 3 may be there without the last
MAX_PENDING_TOKENS = 8  # more tokens in a row without an end are no character, but garbage
MAX_WINDOW_TOKENS = 16
_END_TOKENS = 16


TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


class Tokenizer:
    """A Hugging Face tokenizer with the few operations that the engine uses.

    Attributes:
        backend: the Hugging Face tokenizer.
        vocab_size: ids the tokenizer knows; the model's (padded) vocabulary may be larger.
        bos_token_id: id that starts a text, or None.
        eos_token_ids: ids that end an answer: the tokenizer's and those of the model's
            generation config, ascending.
        special_token_ids: ids that `decode` skips unless asked not to.
        has_chat_template: whether `apply_chat` can be used.
    """

    def __init__(self, backend: Any, eos_token_ids: Sequence[int] = ()) -> None:
        self.backend = backend
        own = [] if backend.eos_token_id is None else [int(backend.eos_token_id)]
        self.vocab_size: int = len(backend)
        self.bos_token_id: int | None = backend.bos_token_id
        self.eos_token_ids: tuple[int, ...] = tuple(sorted({*own, *eos_token_ids}))
        self.special_token_ids: frozenset[int] = frozenset(backend.all_special_ids) | {
            token_id for token_id, token in backend.added_tokens_decoder.items() if token.special
        }
        self.has_chat_template: bool = bool(backend.chat_template)
        self._bytes = TokenBytes(backend)

    @classmethod
    def load(cls, path_or_id: str | Path, chat_template: str | None = None) -> Self:
        """Load from a local folder or by a Hugging Face hub id.

        Args:
            path_or_id: of the tokenizer.
            chat_template: the text of a template instead of its own.

        Raises:
            ValueError: there is no tokenizer there.
        """
        from transformers import AutoTokenizer  # seconds to import; only who loads one pays

        folder = described_folder(path_or_id, "tokenizer")
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):
            raise ValueError(
                f"tokenizer: {folder} has no tokenizer ({TOKENIZER_FILES[0]}); give the folder of "
                "one as `tokenizer`"
            )
        try:
            backend = AutoTokenizer.from_pretrained(str(folder))
        except Exception as error:  # the library for files that are wrong raises bare Exceptions
            raise ValueError(f"tokenizer: cannot load {str(path_or_id)!r}: {error}") from error
        if chat_template is not None:
            backend.chat_template = chat_template
        return cls(backend, _generation_eos_ids(folder))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt, with the BOS token where the tokenizer adds one.

        Raises:
            ValueError: the text has half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half of a surrogate pair is no text: {text[error.start]!a} at character "
                f"{error.start}"
            ) from None
        ids: list[int] = self.backend.encode(
            text, add_special_tokens=add_special_tokens, verbose=False
        )
        return ids

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None
    ) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer starts.

        Args:
            messages: see `check_messages`.
            options: how it is written; default: the assistant's answer is begun.

        Raises:
            ValueError: a message is malformed, the model has no chat template, or its template
                refuses the conversation or fails on it.
        """
        options = options or ChatOptions()
        text = self.chat_text(messages, options)
        # As a rule the template has written them.
        return self.encode(text, add_special_tokens=options.add_special_tokens)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The text of a conversation; arguments and errors are those of `apply_chat`."""
        checked = check_messages(messages)
        if not self.has_chat_template and options.chat_template is None:
            raise ValueError(
                "messages: this model's tokenizer has no chat template; send a plain prompt"
            )
        return render_chat(self.backend, checked, options)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them, such as `Ġthe`."""
        return [str(token) for token in self.backend.convert_ids_to_tokens(list(ids))]

    def info(self) -> dict[str, Any]:
        """What another program needs to use this tokenizer as it is used here."""
        backend = self.backend
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: getattr(backend, name, None) for name in names}
        return {
            "tokenizer_class": type(backend).__name__,
            **{name: None if token is None else str(token) for name, token in special.items()},
            "vocab_size": self.vocab_size,
            "chat_template": backend.chat_template,
        }

    def token_text(self, token_id: int) -> str:
        """One token as text, special tokens by their name (for log-probabilities)."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int, *, at_start: bool = False) -> bytes:
        """What one token adds to a text; joined over the tokens of a text, they are its UTF-8.

        A token that is a part of a character has that part's bytes, a special token its name.
        `at_start` is for the first token of a text, where some tokenizers drop a space.
        """
        return self._bytes(token_id, at_start=at_start)

    def spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of words as a text may have them: at its beginning, and after a space."""
        texts = [form for word in words for form in (word, f" {word}")]
        ids = [tuple(self.encode(text, add_special_tokens=False)) for text in texts]
        return tuple(dict.fromkeys(filter(None, ids)))

    def special_ids(self, names: Sequence[str]) -> frozenset[int]:
        """Ids of those of some texts that are special tokens."""
        ids = self.backend.convert_tokens_to_ids(list(names)) if names else []
        return frozenset(ids) & self.special_token_ids

    def end_of_text(self, ids: Sequence[int]) -> str:
        """The text of the last few token ids, special ones by their names."""
        return self.decode(ids[-_END_TOKENS:], skip_special_tokens=False)

    @property
    def chat_template(self) -> str | None:
        """The chat template; several that a model has for several uses, one after the other."""
        template = self.backend.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or None

    def check_fit(self, field: str, ids: list[int], vocab_size: int) -> list[int]:
        """Token ids that this tokenizer made, if a model with so many tokens can read them.

        Raises:
            ValueError: it cannot; names the field that they came from.
        """
        strange = max(ids, default=0)
        if strange >= vocab_size:
            raise ValueError(
                f"{field} has {self.token_text(strange)!r}, for which the tokenizer has the token "
                f"{strange}; the model's are 0 to {vocab_size - 1}"
            )
        return ids


class IncrementalDetokenizer:
    """Turns the tokens of one sequence into text as they come.

    The texts returned by `append` and `flush` add up to `Tokenizer.decode` of all the tokens, and
    no piece ends inside a character. (One exception: tokenizers with byte-fallback tokens void a
    whole run of byte tokens when one of them is wrong; here characters that were already complete
    stay.) A token costs one decode of a window of some ten tokens, however long the sequence is.

    Args:
        tokenizer: the model's.
        skip_special_tokens: leave special tokens out of the text.
        visible: special tokens that stay in it all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        visible: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = (
            tokenizer.special_token_ids - visible if skip_special_tokens else frozenset()
        )
        self._window: list[int] = []
        self._num_emitted = 0  # characters of the window's text that are out
        self._num_settled = 0  # tokens of the window at the last time when all text was out

    def append(self, token_id: int) -> str:
        """Take the next token and return the text that is certain with it, often one word."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        num_pending_tokens = len(self._window) - self._num_settled
        text = self._text(self._window)
        num_held = len(text) - len(text.rstrip(BROKEN))
        if num_pending_tokens > MAX_PENDING_TOKENS:
            num_held = min(num_held, UNFINISHED)
        delta = text[self._num_emitted : len(text) - num_held]
        self._num_emitted = max(self._num_emitted, len(text) - num_held)
        if num_held == 0:
            self._settle()
        elif num_pending_tokens > 2 * MAX_WINDOW_TOKENS:
            self._cut_garbage(pending=text[self._num_emitted :])
        return delta

    def flush(self) -> str:
        """Return what was held back; the sequence has ended."""
        rest = self._text(self._window)[self._num_emitted :]
        self._window.clear()
        self._num_emitted = self._num_settled = 0
        return rest

    def _settle(self) -> None:
        """All text is out: keep a last piece of it, which decides on a space before the next."""
        if len(self._window) > MAX_WINDOW_TOKENS:
            del self._window[: self._num_settled]
            self._num_emitted = len(self._text(self._window))
        self._num_settled = len(self._window)

    def _cut_garbage(self, pending: str) -> None:
        """Shorten a window that finds no end.

        Its first characters may change by that, but they are out already: only the end counts.
        """
        window = self._window[-MAX_PENDING_TOKENS:]
        text = self._text(window)
        if text.endswith(pending):
            self._window = window
            self._num_emitted = len(text) - len(pending)
            self._num_settled = 0

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class StopChecker:
    """Ends a text at the first of some stop strings, and holds back what may become one.

    The stop string that is complete first counts (the longest of those that end together), so the
    result does not depend on how the text is cut into pieces.

    Attributes:
        matched: the stop string that was found, else None. It is the stop reason.
    """

    def __init__(self, stop: Sequence[str] = (), include_stop_str_in_output: bool = False) -> None:
        for index, string in enumerate(stop):
            if not string:
                raise ValueError(f"stop[{index}] is empty; a stop string needs a character")
        self._stop = tuple(stop)
        self._include = include_stop_str_in_output
        self._held = ""
        self.matched: str | None = None

    def append(self, text: str, can_stop: bool = True) -> str:
        """Take the next piece of text and return what may go out; after a match, nothing.

        With `can_stop=False` (before `min_tokens`) nothing in the text so far is a stop string.
        """
        if self.matched is not None:
            return ""
        text = self._held + text
        if not can_stop:
            self._held = ""
            return text
        found = [(text.find(string), string) for string in self._stop]
        ends = [(at + len(string), at, string) for at, string in found if at >= 0]
        if ends:
            end, start, self.matched = min(ends)
            self._held = ""
            return text[: end if self._include else start]
        num_held = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """Return what was held back; the text has ended without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of `text` that is a proper beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)


def _generation_eos_ids(folder: Path) -> tuple[int, ...]:
    """The end tokens of the model's generation config; none where it has no such config."""
    from transformers import GenerationConfig

    try:
        ids = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    except OSError:
        return ()
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (int(ids),)
