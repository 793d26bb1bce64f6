"""Compiles every Triton kernel for a GPU of compute capability 9.0 that is not there.

Prints the kernels' names. Launching is replaced by compiling: nothing runs.
"""

import functools
import sys
from typing import Any, NamedTuple

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


class Case(NamedTuple):
    """What chooses the code of kernels."""

    dim: int
    group: int
    dtype: torch.dtype = torch.bfloat16
    has_norms: bool = False
    window: int = 0
    softcap: float = 0.0


CASES = [Case(128, 8, has_norms=True), Case(256, 4, window=5, softcap=30.0)]
ALL_CASES = [Case(dim, group) for dim in (64, 128, 256) for group in (1, 4, 8)]
ALL_CASES += [Case(dim, 4, torch.float32, has_norms=True) for dim in (64, 128)]
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
    from saqqara.workers.kernels import activation, attend, decode, mass, norm, pages, rotary, work

    def launch_all(case: Case, max_length: int, first: int) -> None:
        """Every kernel, for rows of a length, with tables that begin `first` entries in."""
        tokens, heads, dim = 3, 1, case.dim
        zeros = functools.partial(torch.zeros, dtype=case.dtype)
        k_pages, v_pages = zeros(40, 16, dim), zeros(40, 16, dim)
        q, k = zeros(tokens, heads * case.group, dim), zeros(tokens, heads, dim)
        cu, numbers = torch.tensor([0, tokens], dtype=torch.int32), torch.zeros(4).long()
        entries = -(-max_length // 16)
        table = torch.zeros(1 + tokens * heads * entries, dtype=torch.int32)[first:]
        table = table[: tokens * heads * entries].view(tokens, heads, entries)
        # A batch of one may come with any stride from one sequence to the next.
        lengths = torch.ones(1 + tokens, heads + 15 * first, dtype=torch.int32)
        lengths = lengths[first : first + tokens, :heads]
        slots = torch.arange(1 + tokens)[first : first + tokens]
        begins = torch.zeros(tokens + 1, heads, dtype=torch.int64)[first : first + tokens]
        in_slots = decode.PagedRows(
            k_pages, v_pages, table.view(-1), lengths, max_length, slots, begins, case.window
        )
        rows = decode.PagedRows(k_pages, v_pages, table, lengths, max_length)
        every_slot = torch.ones(5, 1 + first, heads, dtype=torch.int32)
        work.lengthen(every_slot, slots, every_slot[0] if case.window else None)
        listed = work.list_work(every_slot, slots, max_length)[0]
        cap: dict[str, Any] = {"softcap": case.softcap}
        decode.decode(q, in_slots, 0.1, work=listed, **cap)
        decode.decode(q, rows, 0.1, return_mass=True, **cap)
        decode.decode(q, rows, 0.1, lse=torch.zeros(tokens, heads * case.group), **cap)
        ends = CuSeqlens.of([max_length] * tokens, k.device)
        fresh = zeros(ends.host[-1], heads, dim)
        decode.decode(q, rows_of_prompts(fresh, fresh, ends, case.window), 0.1)
        attend.attend(q, k, k, cu, cu, 64, 0.1, rows, **cap)
        attend.attend(q, k, k, cu, cu, 64, 0.1, window=case.window, **cap)
        mass.mass(q, k, cu, cu, 64, max_length, 0.1, torch.ones(tokens), **cap)
        jobs, some = torch.zeros(3, 5, dtype=torch.int64), numbers[first:]
        pages.fill_pages(k, k, k_pages, v_pages, jobs, some)
        stored = k_pages.view(-1, dim), v_pages.view(-1, dim)
        refs = torch.zeros(1 + tokens * heads, dtype=torch.int64)[first : first + tokens]
        refs = refs.view(tokens, heads)
        pages.append_tokens(k, k, *stored, refs)
        pages.compact_tokens(
            k_pages, v_pages, torch.zeros_like(table).view(-1), some, some, some, some
        )
        qkv, angles = zeros(tokens, (case.group + 2) * heads, dim), torch.zeros(9, dim // 2)
        positions = torch.zeros(1 + tokens, dtype=torch.int64)[first : first + tokens]
        of_heads = zeros(dim) if case.has_norms else None
        rotation = rotary.Rotation(positions, angles, angles, of_heads, of_heads, 0.1)
        rotary.rotate_to(qkv, heads, rotation, q, k, k)
        rotary.rotate_in_place(qkv, heads, rotation)
        rotary.rotate_append(qkv, heads, rotation, *stored, refs)
        rotary.rotate_append_rows(qkv, heads, rotation, in_slots)
        hidden, weight = zeros(tokens, 64 * dim), zeros(64 * dim)
        norm.rms_norm(hidden, weight, 0.1)
        norm.add_rms_norm(hidden, hidden, weight, 0.1, hidden)
        activation.silu_mul(hidden)

    for case in CASES if "--all" not in sys.argv else CASES + ALL_CASES:
        launch_all(case, 1024, first=0)
    before = set(variants)
    launch_all(CASES[0], 2136, first=1)
    assert variants == before, f"other lengths wait for the compiler: {variants - before}"


if __name__ == "__main__":
    main()
