"""The layers of a model as retention sees them, and a budget spread over them or their rows.

A layer with sliding-window attention (a *local* layer) is a retention of its own: a token sees the
last `window` tokens, itself included, so its rows never hold more. Budgets are about the others,
the *global* layers: they alone are counted, and the layer numbers of a formula count them only.
Of these, those that `skip_layers` names keep the whole prompt, and the others share the rest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

from .shapes import Allowance, LayerShape, RowShape, settle


@dataclass(frozen=True)
class Layers:
    """All layers of a model, by what they see.

    Attributes:
        windows: by layer, how many of the last tokens a token sees, itself included; 0 in a global
            layer, which sees all.

    Raises:
        ValueError: no layer, a window below 0, or two windows of different size.
    """

    windows: tuple[int, ...]

    def __post_init__(self) -> None:
        sizes = {*self.windows} - {0}
        if not self.windows or min(self.windows) < 0 or len(sizes) > 1:
            raise ValueError(
                f"windows: must be one number a layer, 0 or the same number, not {self.windows!r}"
            )

    @classmethod
    def of(cls, layers: "int | Layers") -> "Layers":
        """These layers, or so many global ones."""
        return layers if isinstance(layers, Layers) else _all_global(layers)

    def __len__(self) -> int:
        return len(self.windows)

    @cached_property
    def window(self) -> int:
        """Tokens that a token of a local layer sees, itself included; 0 without local layers."""
        return max(self.windows)

    @cached_property
    def global_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that see all tokens, rising."""
        return tuple(number for number, window in enumerate(self.windows) if not window)

    @cached_property
    def local_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that see a window, rising."""
        return tuple(number for number, window in enumerate(self.windows) if window)

    def local_tokens(self, num_tokens: int) -> int:
        """Tokens that a row of a local layer holds of a text of so many: the last ones."""
        return min(num_tokens, self.window)

    def check_global(self, number: int, setting: str) -> None:
        """Raise a ValueError, which names the setting, unless that layer is a global one."""
        if number in self.local_layers:
            known = ", ".join(map(str, self.global_layers)) or "none"
            raise ValueError(
                f"{setting}: layer {number} sees {self.window} tokens only and keeps these in any "
                f"case; layers that see all tokens: {known}"
            )


@lru_cache(maxsize=256)
def _all_global(num_layers: int) -> Layers:
    return Layers((0,) * num_layers)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a retention with a score says of one prompt, in tokens.

    Attributes:
        tokens: mean of the global layers' rows, at most the prompt.
        window: last tokens of the prompt, which every row keeps.
        sinks: first tokens of the prompt, which every row keeps.
        skip_layers: numbers of the layers that keep the whole prompt, rising.
        prompt_tokens: length of the prompt.
    """

    tokens: int
    window: int
    sinks: int
    skip_layers: tuple[int, ...]
    prompt_tokens: int


def over_layers(shape: LayerShape, budget: Budget, layers: Layers) -> list[int]:
    """Tokens per row of each layer; the whole prompt for layers that have no part in the budget.

    Raises:
        ValueError: see `Retention.layer_tokens`.
    """
    counts = [budget.prompt_tokens] * len(layers)
    shared, total = _shared(budget, layers)
    if shared:
        allowance = _allowance(budget, Fraction(total, len(shared)))
        targets = shape.targets(allowance, len(shared))
        settled = settle(targets, total, allowance.floor, budget.prompt_tokens)
        for layer, count in zip(shared, settled, strict=True):
            counts[layer] = count
    return counts


def over_rows(
    shape: RowShape, budget: Budget, layers: Layers, num_heads: int
) -> list[Sequence[int]]:
    """Tokens of each row, by layer; arguments and errors as of `over_layers`."""
    weights = shape.weights(len(layers), num_heads)
    rows: list[Sequence[int]] = [[budget.prompt_tokens] * num_heads for _ in range(len(layers))]
    shared, total = _shared(budget, layers)
    if shared:
        allowance = _allowance(budget, Fraction(total, len(shared)))
        targets = shape.targets(allowance, [weights[layer] for layer in shared])
        settled = settle(targets, total * num_heads, allowance.floor, budget.prompt_tokens)
        for place, layer in enumerate(shared):
            rows[layer] = settled[place * num_heads : (place + 1) * num_heads]
    return rows


def _allowance(budget: Budget, mean: Fraction) -> Allowance:
    return Allowance(mean, budget.window, budget.sinks, budget.prompt_tokens)


def _shared(budget: Budget, layers: Layers) -> tuple[list[int], int]:
    """The layers that drop tokens, and what they keep together per kv head; none: all keep all."""
    skipped, num_global = budget.skip_layers, len(layers.global_layers)
    if num_global == 0:
        raise ValueError(
            f"budget: every layer of this model sees a window of {layers.window} tokens and keeps "
            "no more in any case, so there is nothing to share out; choose full retention"
        )
    if skipped and skipped[-1] >= len(layers):
        raise ValueError(
            f"skip_layers: {skipped[-1]} is no layer of this model, which has layers 0 to "
            f"{len(layers) - 1}"
        )
    for layer in skipped:
        layers.check_global(layer, "skip_layers")
    if budget.tokens == budget.prompt_tokens:
        return [], 0

    shared = [layer for layer in layers.global_layers if layer not in skipped]
    total = num_global * budget.tokens - len(skipped) * budget.prompt_tokens
    floor = budget.window + budget.sinks
    if not shared or total < len(shared) * floor:
        least = math.ceil((len(skipped) * budget.prompt_tokens + len(shared) * floor) / num_global)
        raise ValueError(
            f"skip_layers: {len(skipped)} of {num_global} layers keep all {budget.prompt_tokens} "
            "tokens, which with the window and sinks of the others is more than budget "
            f"{budget.tokens} allows; it takes a budget of at least {least}"
        )
    return shared, total
