"""Catches what would make the host wait for a GPU, on a machine without one.

On a CPU nothing waits, so it is told by names: what reads numbers of a tensor (`item`, `tolist`,
`cpu`, a truth value, `nonzero` and all whose shape depends on numbers), and what copies ordinary
memory to the device or back other than by `workers/transfer.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

READS = {
    *("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"),
    *("nonzero", "masked_select", "unique", "repeat_interleave", "__iter_values__", "is_nonzero"),
    *("pin_memory", "equal", "allclose", "bincount"),
}
MAKES = {"tensor", "as_tensor", "from_numpy"}
WAITING_OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")


class HostWaitError(AssertionError):
    """The host would wait for the device here."""


class _Calls(TorchFunctionMode):
    def __init__(self, watch: "HostWaits") -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self._watch.is_on and (name in READS or name in MAKES):
            raise HostWaitError(f"{name} in a step")
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, watch: "HostWaits") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if self._watch.is_on:
            if any(f"aten.{waiting}." in name for waiting in WAITING_OPERATORS):
                raise HostWaitError(f"{name} in a step")
            if "index" in name and _has_mask(args):
                raise HostWaitError(f"{name} by a mask in a step")
            self._watch.num_operators += 1
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    """Whether something is indexed by booleans, whose number has to be known first."""
    lists = [x for x in args if isinstance(x, list | tuple)]
    return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for y in lists for x in y)


class HostWaits:
    """While `watching`, every wait of the host is an error, but inside what was `allowed`.

    Attributes:
        num_operators: what torch was asked to do while watched.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.num_operators = 0

    def allowed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, not looked into."""

        def call(*args: Any, **kwargs: Any) -> Any:
            was_on, self.is_on = self.is_on, False
            try:
                return function(*args, **kwargs)
            finally:
                self.is_on = was_on

        return call

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at everything that torch is asked to do in here.

        Triton's interpreter reads tensors to run a kernel: that is no part of the step.
        """
        run = self.allowed(InterpretedFunction.run)
        with patch.object(InterpretedFunction, "run", run), _Calls(self), _Operators(self):
            self.is_on = True
            try:
                yield
            finally:
                self.is_on = False
