"""Compiles every Triton kernel, in bfloat16, for a GPU of compute capability 9.0 that is not there.

Prints the kernels' names. Launching is replaced by compiling: nothing runs.
"""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class AbsentGpu:
    """What the compiler asks a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0


def main() -> None:
    driver.set_active(AbsentGpu())
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        assert compiled.asm["cubin"]
        print(kernel.__name__)
        return compiled

    JITFunction.run = compile_only
    from saqqara.workers.kernels import attend, decode, mass, pages

    tokens, heads, group, dim = 3, 8, 4, 64
    k_pages, v_pages = (torch.zeros(40, 16, dim, dtype=torch.bfloat16) for _ in range(2))
    table = torch.zeros(tokens, heads, 64, dtype=torch.int32)
    lengths = torch.ones(tokens, heads, dtype=torch.int32)
    q = torch.zeros(tokens, heads * group, dim, dtype=torch.bfloat16)
    k = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16)
    slots = torch.arange(tokens)
    rows = decode.PagedRows(k_pages, v_pages, table, lengths, 1024, slots)
    decode.decode(q, rows, 0.1, new=(k, k), return_mass=True)
    rows = decode.PagedRows(k_pages, v_pages, table, lengths, 1024)
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    attend.attend(q, k, k, cu, cu, 64, 0.1, rows)
    mass.mass(q, k, cu, cu, 64, 2000, 0.1, torch.ones(tokens))
    jobs, indices = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)
    pages.fill_pages(k, k, k_pages, v_pages, jobs, indices)
    refs = torch.zeros(tokens, heads, dtype=torch.int64)
    pages.append_tokens(k, k, k_pages.view(-1, dim), v_pages.view(-1, dim), refs)
    numbers = torch.zeros(3, dtype=torch.int64)
    pages.compact_tokens(k_pages, v_pages, table.view(-1), numbers, numbers, numbers, numbers)


if __name__ == "__main__":
    main()
