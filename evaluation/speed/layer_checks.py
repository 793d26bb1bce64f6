"""Checks of the Triton kernels around attention, as in `kernel_checks.py`.

Shapes: T tokens, Hq query heads, H kv heads, D head dim.
"""

from dataclasses import replace

import torch
from torch import Tensor

from saqqara.workers.attention.reference import ReferenceAttention
from saqqara.workers.kernels import activation, decode, norm, rotary, work

from .kernel_cases import TOLERANCES, Case, close, paged, plain, plain_view, same

_ORACLE = ReferenceAttention()


def check_step(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """A decode step's attention: new tokens are stored, their rows' parts listed and shared out.

    Slots come in any order, with padding between them; the second of three layers is computed.
    """
    case = Case(device, dtype, seed)
    view = case.view(case.lengths(5, most=140) + 1)
    s, slots = case.sizes, torch.tensor([3, -1, 0, 4, -1], dtype=torch.int64, device=device)
    rows, layer = replace(paged(view), slots=slots), 1
    rotation, qkv, (q, k, v) = _projected(case, 5, norms=seed % 2 == 1)
    stored = [x.clone() for x in (view.k_pages, view.v_pages)]
    queries = rotary.rotate_append_rows(qkv, s.num_heads, rotation, rows)
    worst = close(queries, q, TOLERANCES[dtype])
    for entry, slot in enumerate(slots.tolist()):
        for head in range(s.num_heads if slot >= 0 else 0):
            last = int(view.lengths[slot, head]) - 1
            page = int(view.page_table[slot, head, last // view.page_tokens])
            for before, pages_now, new in zip(
                stored, (view.k_pages, view.v_pages), (k, v), strict=True
            ):
                place = (page, last % view.page_tokens)
                worst = max(worst, close(pages_now[place], new[entry, head], TOLERANCES[dtype]))
                before[place] = pages_now[place]
    same(view.k_pages, stored[0])
    same(view.v_pages, stored[1])
    lengths = torch.stack([view.lengths + 9, view.lengths, view.lengths * 2], dim=1)
    listed = work.list_work(lengths, slots, 2 * view.max_length, split_tokens=64)
    before = lengths.clone()
    work.lengthen(lengths, slots)
    before[slots[slots >= 0]] += 1
    same(lengths, before)
    out, _ = decode.decode(queries, rows, s.scale, split_tokens=64, work=listed[layer])
    alone, _ = decode.decode(queries, rows, s.scale, split_tokens=64)
    same(out, alone)
    real = slots >= 0
    assert (out[~real] == 0).all(), "padding attends to something"
    chosen = slots[real]
    held = replace(view, page_table=view.page_table[chosen], lengths=view.lengths[chosen])
    expected = _ORACLE.decode(plain(queries[real]), plain_view(held), s.scale)
    return max(worst, close(out[real], expected, TOLERANCES[dtype]))


def check_rotation(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Rotated heads go to tensors, stay where they are, or go where each is told, or nowhere."""
    case, worst = Case(device, dtype, seed), 0.0
    heads, dim = case.sizes.num_heads, case.sizes.dim
    for norms in (False, True):
        rotation, qkv, expected = _projected(case, 6, norms)
        out = [torch.empty_like(x.to(qkv.dtype)) for x in expected]
        rotary.rotate_to(qkv, heads, rotation, *out)
        there, refs = qkv.clone(), torch.from_numpy(case.numbers.permutation(100)[: 6 * heads])
        refs = refs.view(6, heads).to(device)
        refs[2, 0] = -1
        k_stored, v_stored = case.randn(100, dim), case.randn(100, dim)
        wanted = [k_stored.clone(), v_stored.clone()]
        for old, new in zip(wanted, out[1:], strict=True):
            old[refs[refs >= 0]] = new[refs >= 0]
        same(rotary.rotate_append(there, heads, rotation, k_stored, v_stored, refs), out[0])
        same(torch.cat([k_stored, v_stored]), torch.cat(wanted))
        rotary.rotate_in_place(qkv, heads, rotation)
        same(qkv, torch.cat(out, dim=1))
        for got, want in zip(out, expected, strict=True):
            worst = max(worst, close(got, want, TOLERANCES[dtype]))
    return worst


def check_norm(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Norms, and norms of sums, with their roundings, to within one of them; the sum exact."""
    case = Case(device, dtype, seed)
    size = int(case.numbers.choice([64, 576, 1000, 4096]))
    x, residual, weight = (
        case.randn(5, size),
        4 * case.randn(5, size + 8)[:, :size],
        case.randn(size),
    )
    total = x + residual
    same(norm.rms_norm(x, weight, 1e-5), norm.add_rms_norm(x, x * 0, weight, 1e-5, x.clone()))
    got = norm.add_rms_norm(x, residual, weight, 1e-5, residual)
    same(residual, total)
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    expected = (normed.to(dtype) * weight).float()
    return close(got, expected, max(2e-6, 2 * torch.finfo(dtype).eps))


def check_activation(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Gates from far below 0 to far above, rounded after the activation and after the product."""
    case = Case(device, dtype, seed)
    size = int(case.numbers.choice([8, 1000, 1536]))
    gate_up = 5 * case.randn(4, 2 * size)
    gate_up[0, :4] = torch.tensor([-80.0, -20.0, 20.0, 80.0])
    gate, up = gate_up.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    return close(
        activation.silu_mul(gate_up), expected.float(), max(2e-6, 2 * torch.finfo(dtype).eps)
    )


def _projected(
    case: Case, count: int, norms: bool
) -> tuple[rotary.Rotation, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """A fused projection [T, Hq + 2 H, D], and in float32 the heads that should come of it."""
    s = case.sizes
    qkv = case.randn(count, s.num_heads * (s.group + 2), s.dim)
    positions = torch.from_numpy(case.numbers.integers(0, 50, count)).to(case.device)
    angles = 3 * case.randn(50, s.dim // 2).float()
    weights = [case.randn(s.dim) if norms else None for _ in "qk"]
    of_heads = (weights[0], weights[1], 1e-6)
    rotation = rotary.Rotation(positions, angles.cos(), angles.sin(), *of_heads)
    cos, sin = (x[positions][:, None] for x in (rotation.cos, rotation.sin))
    heads = []
    parts = torch.split(qkv, [s.num_heads * s.group, s.num_heads, s.num_heads], dim=1)
    for x, weight in zip(parts, weights, strict=False):
        wide = x.float()
        if weight is not None:
            square = wide.square().mean(-1, keepdim=True)
            wide = ((wide * torch.rsqrt(square + 1e-6)).to(case.dtype) * weight).float()
        a, b = wide.chunk(2, dim=-1)
        heads.append(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
    return rotation, qkv, (heads[0], heads[1], parts[2].float())
