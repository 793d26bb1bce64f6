"""Log-probabilities in the shapes of OpenAI's API, and where each token begins in the text.

Tokens that are parts of a character are spelled `bytes:\\xe6\\x97`, as OpenAI spells them.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from saqqara.cluster.request import Logprob, PromptLogprobs

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


def completion_logprobs(
    entries: Iterable[Entry], count: int, offsets: TextOffsets, as_ids: bool = False
) -> Json:
    """Parallel lists, one item per token; the `count` best always with the sampled one.

    Args:
        entries: of the tokens, in order.
        count: of the best ones that are shown.
        offsets: where the next token begins; goes on with these tokens.
        as_ids: name tokens by their ids.
    """
    lists: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        token_id, token = _chosen(entry)
        best = {_name(i, t, as_ids): _value(t) for i, t in _best(entry, count)}
        name = _name(token_id, token, as_ids)
        best.setdefault(name, _value(token))
        lists["tokens"].append(name)
        lists["token_logprobs"].append(_value(token))
        lists["top_logprobs"].append(best)
        lists["text_offset"].append(offsets.next(token.token_bytes))
    return lists


def echoed_logprobs(
    prompt: PromptLogprobs, first_id: int, count: int, offsets: TextOffsets, as_ids: bool = False
) -> Json:
    """`completion_logprobs` of a prompt: its first token has none.

    Args:
        prompt: its log-probabilities.
        first_id: its first token.
        count: of the best ones that are shown.
        offsets: goes on with the prompt's tokens.
        as_ids: name tokens by their ids.
    """
    first = prompt.first
    head: Json = {
        "tokens": [_name(first_id, first, as_ids)],
        "token_logprobs": [None],
        "top_logprobs": [None],
        "text_offset": [offsets.next(first.token_bytes)],
    }
    entries = (entry for entry in prompt if entry is not None)
    rest = completion_logprobs(entries, count, offsets, as_ids)
    return {name: items + rest[name] for name, items in head.items()}


def prompt_logprobs(prompt: PromptLogprobs, count: int, as_ids: bool = False) -> list[Json | None]:
    """A prompt's log-probabilities as vLLM shows them: by token id, null for the first token."""
    return [
        None
        if entry is None
        else {str(i): _vllm_token(i, t, as_ids) for i, t in _all(entry, count)}
        for entry in prompt
    ]


def chat_logprobs(
    entries: Sequence[Entry], count: int, show_token_ids: bool, as_ids: bool = False
) -> Json:
    """One object per token, with the `count` best in its place."""
    content = []
    for entry in entries:
        token_id, token = _chosen(entry)
        top = [_chat_token(i, t, as_ids) for i, t in _best(entry, count)]
        shown_id = {"token_id": token_id} if show_token_ids else {}
        content.append({**_chat_token(token_id, token, as_ids), **shown_id, "top_logprobs": top})
    return {"content": content, "refusal": None}


def _vllm_token(token_id: int, token: Logprob, as_ids: bool) -> Json:
    name = _name(token_id, token, as_ids)
    return {"logprob": _value(token), "rank": token.rank, "decoded_token": name}


def _chat_token(token_id: int, token: Logprob, as_ids: bool) -> Json:
    return {
        "token": _name(token_id, token, as_ids),
        "logprob": _value(token),
        "bytes": list(token.token_bytes),
    }


def _name(token_id: int, token: Logprob, as_ids: bool) -> str | None:
    return f"token_id:{token_id}" if as_ids else token.decoded_token


def _value(token: Logprob) -> float:
    return max(token.logprob, LEAST)


def _chosen(entry: Entry) -> tuple[int, Logprob]:
    """The sampled token, which comes first."""
    return next(iter(entry.items()))


def _all(entry: Entry, count: int) -> Iterator[tuple[int, Logprob]]:
    """The token that stands there, and the `count` best."""
    chosen = _chosen(entry)
    yield chosen
    yield from (item for item in _best(entry, count) if item[0] != chosen[0])


def _best(entry: Entry, count: int) -> list[tuple[int, Logprob]]:
    """The `count` best tokens in order; the sampled one only if it is among them."""
    best = [(token.rank, i, token) for i, token in entry.items() if token.rank is not None]
    ranked = sorted(best, key=lambda item: item[0])
    return [(i, token) for rank, i, token in ranked if rank <= count]
