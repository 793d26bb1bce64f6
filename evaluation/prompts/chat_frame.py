"""What a chat template puts around a user's message, in tokens, so that lengths can be exact."""

from collections.abc import Sequence
from dataclasses import dataclass

from saqqara.cluster.engine.tokenizer import Tokenizer

_MARK = "@@message@@"


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """The tokens before and after a user's message, up to where the answer starts.

    A model without a chat template gets plain text: its BOS token, if it has one, and nothing else.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatFrame":
        """The frame of a model's chat template.

        Raises:
            ValueError: the template does not show a user's message exactly once, as it is.
        """
        if not tokenizer.has_chat_template:
            return cls.plain(tokenizer)
        ids = tokenizer.apply_chat([{"role": "user", "content": _MARK}])
        parts = tokenizer.decode(ids, skip_special_tokens=False).split(_MARK)
        if len(parts) != 2:
            raise ValueError("tokenizer: its chat template does not show a message once, as it is")
        before, after = (tokenizer.encode(part, add_special_tokens=False) for part in parts)
        return cls(tuple(before), tuple(after))

    @classmethod
    def plain(cls, tokenizer: Tokenizer) -> "ChatFrame":
        """The frame of plain text."""
        return cls(tuple(tokenizer.encode("")), ())

    @property
    def num_tokens(self) -> int:
        """Tokens that it adds to a message."""
        return len(self.before) + len(self.after)

    def wrap(self, message: Sequence[int], answer_prefix: Sequence[int] = ()) -> tuple[int, ...]:
        """The prompt of a message, with the beginning of the answer if it is given."""
        return (*self.before, *message, *self.after, *answer_prefix)
