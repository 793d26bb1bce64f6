"""Counts what a GPU would be asked to do: kernels of torch, and launches of Triton."""

from collections import Counter
from contextlib import ExitStack
from typing import Any, Self
from unittest.mock import patch

from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach"}
_WAITING = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select"}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of the kernels that were launched inside, as often as they were.

    An operator of torch counts as one kernel unless it only allocates or makes a view. What
    Triton's interpreter does with torch to run a kernel is neither counted nor seen by modes.

    Raises:
        AssertionError: an operator that makes the host wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()
        self._patches = ExitStack()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _WAITING, f"{name} makes the host wait"
        if name not in _NO_KERNEL and not func.is_view:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        run, names = InterpretedFunction.run, self.names

        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            names[kernel.fn.__name__] += 1
            with _disable_current_modes():
                return run(kernel, *args, **kwargs)

        self._patches.enter_context(patch.object(InterpretedFunction, "run", counted))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()
