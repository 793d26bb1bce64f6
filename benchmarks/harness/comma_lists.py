"""Flags whose value is a list with commas between its parts."""

import argparse
from collections.abc import Callable, Collection
from typing import TypeVar

T = TypeVar("T")


def comma_list(part: Callable[[str], T], what: str) -> Callable[[str], list[T]]:
    """A `type` of argparse: at least one part, each read by `part`, which raises ValueError.

    Args:
        part: reads one.
        what: the parts have to be, for the message.
    """

    def read(text: str) -> list[T]:
        try:
            return [part(each) for each in text.split(",")]
        except ValueError as error:
            message = f"must be {what} with commas between, not {text!r}"
            raise argparse.ArgumentTypeError(message) from error

    return read


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """A part that is one of these names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return read


def above_zero(text: str) -> int:
    """A part that counts something."""
    if (number := int(text)) <= 0:
        raise ValueError(text)
    return number


def fraction(text: str) -> float:
    """A part from 0 up to, but not, 1."""
    if not 0 <= (number := float(text)) < 1:
        raise ValueError(text)
    return number
