"""Lets Triton's interpreter, which proves the kernels without a GPU, run with NumPy 2.4.

The interpreter keeps scalars as arrays of one element and counts loops with `int(array)`, which
NumPy 2.4 refuses (Triton 3.6). Compiled kernels never come here.
"""

from typing import Any

from triton.runtime import interpreter


def accept_new_numpy() -> None:
    """Let scalars of the interpreter serve as loop bounds; for this process."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch
