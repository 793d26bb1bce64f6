"""The layers of a model as retention sees them: some see all tokens, others a window of them.

A layer with sliding-window attention (a *local* layer) is a retention of its own: a token sees the
last `window` tokens, itself included, so its rows never hold more. Budgets are about the others,
the *global* layers: they alone are counted, and the layer numbers of a formula count them only.
"""

from dataclasses import dataclass
from functools import cached_property


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
        return layers if isinstance(layers, Layers) else cls((0,) * layers)

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
