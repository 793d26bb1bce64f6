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


MAX_SHARED_BYTES = 227 << 10  # of one program, at compute capability 9.0


def main() -> None:
    driver.set_active(AbsentGpu())
    launch = JITFunction.run
    variants: set[tuple[str, str]] = set()

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = launch(kernel, *args, grid=grid, warmup=True, **kwargs)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= MAX_SHARED_BYTES, (kernel, compiled.metadata.shared)
        variants.add((kernel.__name__, compiled.hash))
        print(kernel.__name__)
        return compiled

    JITFunction.run = compile_only
    from saqqara.workers.attention.base import CuSeqlens
    from saqqara.workers.attention.triton import rows_of_prompts
    from saqqara.workers.kernels import attend, decode, mass, pages

    tokens, heads, group, dim = 3, 1, 8, 128
    k_pages, v_pages = (torch.zeros(40, 16, dim, dtype=torch.bfloat16) for _ in range(2))
    q = torch.zeros(tokens, heads * group, dim, dtype=torch.bfloat16)
    k = torch.zeros(tokens, heads, dim, dtype=torch.bfloat16)
    cu, numbers = torch.tensor([0, tokens], dtype=torch.int32), torch.zeros(4, dtype=torch.int64)

    def launch_all(max_length: int, first: int) -> None:
        """Every kernel, for rows of a length, with tables that begin `first` entries in."""
        entries = -(-max_length // 16)
        table = torch.zeros(1 + tokens * heads * entries, dtype=torch.int32)[first:]
        table = table[: tokens * heads * entries].view(tokens, heads, entries)
        # A batch of one may come with any stride from one sequence to the next.
        lengths = torch.ones(1 + tokens, heads + 15 * first, dtype=torch.int32)
        lengths = lengths[first : first + tokens, :heads]
        slots = torch.arange(1 + tokens)[first : first + tokens]
        begins = torch.zeros(tokens + 1, heads, dtype=torch.int64)[first : first + tokens]
        flat = table.view(-1)
        rows = decode.PagedRows(k_pages, v_pages, flat, lengths, max_length, slots, begins)
        decode.decode(q, rows, 0.1, new=(k, k), return_mass=True)
        rows = decode.PagedRows(k_pages, v_pages, table, lengths, max_length)
        decode.decode(q, rows, 0.1, lse=torch.zeros(tokens, heads * group))
        ends = CuSeqlens.of([max_length // tokens] * tokens, k.device)
        fresh = torch.zeros(ends.host[-1], heads, dim, dtype=torch.bfloat16)
        decode.decode(q, rows_of_prompts(fresh, fresh, ends), 0.1)
        attend.attend(q, k, k, cu, cu, 64, 0.1, rows)
        mass.mass(q, k, cu, cu, 64, max_length, 0.1, torch.ones(tokens))
        jobs, some = torch.zeros(3, 5, dtype=torch.int64), numbers[first:]
        pages.fill_pages(k, k, k_pages, v_pages, jobs, some)
        refs = torch.zeros(1 + tokens * heads, dtype=torch.int64)[first : first + tokens]
        stored = k_pages.view(-1, dim), v_pages.view(-1, dim)
        pages.append_tokens(k, k, *stored, refs.view(tokens, heads))
        pages.compact_tokens(
            k_pages, v_pages, torch.zeros_like(table).view(-1), some, some, some, some
        )

    launch_all(1024, first=0)
    before = set(variants)
    launch_all(2136, first=1)
    assert variants == before, f"other lengths wait for the compiler: {variants - before}"


if __name__ == "__main__":
    main()
