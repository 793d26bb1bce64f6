"""Real English text that every Python carries: the topics of `pydoc`, for prompts of any length."""

from pydoc_data.topics import topics


def pydoc_text() -> str:
    """The topics of Python's own documentation in one text, in alphabetical order."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(tokens: list[int], num_windows: int, num_tokens: int) -> list[list[int]]:
    """`num_windows` runs of `num_tokens` tokens that start evenly spread over a text.

    Raises:
        ValueError: the text is shorter than a window, or has too few different ones.
    """
    starts = len(tokens) - num_tokens + 1
    if starts < num_windows:
        raise ValueError(
            f"a text of {len(tokens)} tokens has no {num_windows} different windows of "
            f"{num_tokens} tokens"
        )
    firsts = [i * starts // num_windows for i in range(num_windows)]
    return [tokens[first : first + num_tokens] for first in firsts]
