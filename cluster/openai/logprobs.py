"""Log-probabilities in the shapes of OpenAI's API, and where each token begins in the text.

Tokens that are parts of a character are spelled `bytes:\\xe6\\x97`, as OpenAI spells them.
"""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from saqqara.cluster.request import Logprob

Json = dict[str, Any]
Entry = Mapping[int, Logprob]  # the sampled token first, then the best

LEAST = -9999.0  # what OpenAI writes for "very unlikely"; JSON has no infinity


class TextOffsets:
    """Counts the characters of a text before each of its tokens.

    Of a character that several tokens share, each begins where it does. Tokens that a stop string
    has cut off have the place that they would have had.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0

    def next(self, data: bytes) -> int:
        """Where the next token begins, whose bytes these are."""
        pending, _ = self._decoder.getstate()
        offset = self._num_chars
        if _is_cut_short(pending, data):  # then it is U+FFFD, twice for half a surrogate
            offset += len(pending.decode(errors="replace"))
        self._num_chars += len(self._decoder.decode(data))
        return offset


def _is_cut_short(pending: bytes, data: bytes) -> bool:
    """Whether the beginning of a character does not go on with the next bytes."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(pending + data[:1])
    except UnicodeDecodeError:
        return bool(pending)
    return False


def completion_logprobs(entries: Sequence[Entry], count: int, offsets: TextOffsets) -> Json:
    """Parallel lists, one item per token; the `count` best always with the sampled one."""
    chosen = [_chosen(entry)[1] for entry in entries]
    best = [_best(entry, count) for entry in entries]
    shown = [
        tokens if token in tokens else [*tokens, token]
        for token, tokens in zip(chosen, best, strict=True)
    ]
    return {
        "tokens": [token.decoded_token for token in chosen],
        "token_logprobs": [_value(token) for token in chosen],
        "top_logprobs": [
            {token.decoded_token: _value(token) for token in tokens} for tokens in shown
        ],
        "text_offset": [offsets.next(token.token_bytes) for token in chosen],
    }


def chat_logprobs(entries: Sequence[Entry], count: int, show_token_ids: bool) -> Json:
    """One object per token, with the `count` best in its place."""
    content = []
    for entry in entries:
        token_id, token = _chosen(entry)
        top = [_chat_token(token) for token in _best(entry, count)]
        shown_id = {"token_id": token_id} if show_token_ids else {}
        content.append({**_chat_token(token), **shown_id, "top_logprobs": top})
    return {"content": content, "refusal": None}


def _chat_token(token: Logprob) -> Json:
    return {
        "token": token.decoded_token,
        "logprob": _value(token),
        "bytes": list(token.token_bytes),
    }


def _value(token: Logprob) -> float:
    return max(token.logprob, LEAST)


def _chosen(entry: Entry) -> tuple[int, Logprob]:
    """The sampled token, which comes first."""
    return next(iter(entry.items()))


def _best(entry: Entry, count: int) -> list[Logprob]:
    """The `count` best tokens in order; the sampled one only if it is among them."""
    best = [(token.rank, token) for token in entry.values() if token.rank is not None]
    return [token for rank, token in sorted(best, key=lambda pair: pair[0]) if rank <= count]
