"""How much memory torch takes at most, on any device: what an allocator would be asked for."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that were alive at once of those allocated inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def storages(values: Any) -> list[Any]:
            return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, torch.Tensor)]

        given = {storage._cdata for storage in storages((args, kwargs))}  # meta has no addresses
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage._cdata not in given and id(storage) not in self._known:
                self._known[id(storage)] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, id(storage))
        self.peak = max(self.peak, self.live)
        return out

    def _forget(self, storage: int) -> None:
        self.live -= self._known.pop(storage)
