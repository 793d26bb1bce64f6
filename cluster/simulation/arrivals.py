"""When requests arrive, and how long they are: drawn from a seed, or read from a file.

Shapes: N requests.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saqqara.configs.shown import shown

from .json_lines import check_seconds, objects_in

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_FIELDS = ("seconds", "prompt_tokens", "new_tokens")
_MAX_TOKENS = 2**31


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        seconds: when each arrives, float64 [N], from 0 on.
        prompt_tokens, new_tokens: int64 [N].
    """

    seconds: Floats
    prompt_tokens: Ints
    new_tokens: Ints

    def __len__(self) -> int:
        return len(self.seconds)

    def part(self, which: Ints) -> "Trace":
        """Some of the requests, by their places."""
        return Trace(self.seconds[which], self.prompt_tokens[which], self.new_tokens[which])

    def check_lengths(self, max_model_len: int) -> None:
        """Raise a ValueError unless every request fits the longest sequence."""
        total = self.prompt_tokens + self.new_tokens
        if len(self) and total.max() > max_model_len:
            worst = int(total.argmax())
            raise ValueError(
                f"arrivals: request {worst + 1} has {self.prompt_tokens[worst]} tokens in and "
                f"{self.new_tokens[worst]} out, more than max_model_len={max_model_len}"
            )


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long requests are.

    Attributes:
        prompt_tokens, new_tokens: their means.
        spread: standard deviation over mean, of both; 0: all alike. Drawn log-normally.
        most: tokens in and out together; longer ones are cut, the answer first.
    """

    prompt_tokens: int
    new_tokens: int
    spread: float
    most: int

    def draw(self, num_requests: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
        """Tokens of prompts and answers, int64 [N] each, at least 1."""
        prompts = self._drawn(self.prompt_tokens, num_requests, rng)
        answers = self._drawn(self.new_tokens, num_requests, rng)
        prompts = np.minimum(prompts, self.most - 1)
        return prompts, np.minimum(answers, self.most - prompts)

    def _drawn(self, mean: int, num_requests: int, rng: np.random.Generator) -> Ints:
        variance = math.log1p(self.spread**2)
        factors = rng.lognormal(-variance / 2, math.sqrt(variance), num_requests)
        drawn: Ints = np.maximum(np.rint(mean * factors), 1).astype(np.int64)
        return drawn


def drawn_trace(
    num_requests: int, rate: float, lengths: Lengths, seed: int, burst_size: int = 1
) -> Trace:
    """A Poisson process of `rate` requests a second; `burst_size` of them come at once."""
    num_bursts = -(-num_requests // burst_size)
    gaps = np.random.default_rng([seed, 0]).exponential(burst_size / rate, num_bursts)
    seconds = np.repeat(np.cumsum(gaps), min(burst_size, num_requests))[:num_requests]
    drawn = lengths.draw(num_requests, np.random.default_rng([seed, 1]))
    return Trace(seconds, *drawn)


def read_trace(path: Path) -> Trace:
    """Requests from JSON lines of `seconds`, `prompt_tokens` and `new_tokens`, in any order.

    Raises:
        ValueError: no such file, or a line is wrong; names it.
    """
    rows = [_row(where, row) for where, row in objects_in(path, "arrivals", _FIELDS, _FIELDS)]
    if not rows:
        raise ValueError(f"arrivals: {path} has no requests")
    values = np.array(rows, dtype=np.float64)
    values = values[np.argsort(values[:, 0], kind="stable")]
    return Trace(values[:, 0].copy(), values[:, 1].astype(np.int64), values[:, 2].astype(np.int64))


def _row(where: str, row: Mapping[str, Any]) -> tuple[float, int, int]:
    seconds, prompt, new = (row[field] for field in _FIELDS)
    for name, value in (("prompt_tokens", prompt), ("new_tokens", new)):
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not 1 <= value <= _MAX_TOKENS:
            raise ValueError(
                f"{where}: {name} must be a whole number from 1 to {_MAX_TOKENS}, not "
                f"{shown(value)}"
            )
    return check_seconds(where, "seconds", seconds), prompt, new
