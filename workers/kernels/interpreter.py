"""Lets Triton's interpreter, which proves the kernels without a GPU, do what compiled kernels do.

For Triton 3.6; compiled kernels never come here.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def accept_new_numpy() -> None:
    """Let scalars of the interpreter serve as loop bounds; for this process.

    It keeps scalars as arrays of one element and counts loops with `int(array)`, which NumPy 2.4
    refuses.
    """
    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: scalar.handle.data.item())

    interpreter._patch_lang_tensor = patch


def compute_bfloat16() -> None:
    """Round to bfloat16 as GPUs do, and multiply matrices of it; for this process.

    The interpreter keeps its bits as uint16, cuts what does not fit, and multiplies the bits.
    """
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def rounding_cast(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return cast(self, source, dtype)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), dtype.scalar)

    def widening_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, x, tl.float32) for x in (a, b))
        return dot(self, a, b, *args)

    builder.cast_impl, builder.create_dot = rounding_cast, widening_dot
