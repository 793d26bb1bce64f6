"""Checks of every Triton kernel against the float32 oracle, over random shapes.

Plain functions of (device, dtype, seed): tests call them in Triton's interpreter, `gpu_check` on a
GPU. Each returns the largest deviation and raises AssertionError where it is too large. Here are
those of attention and of moves; `layer_checks.py` has those of what surrounds attention.

Shapes: N sequences, H kv heads, G query heads per kv head, D head dim, P pages.
"""

from collections.abc import Callable

import numpy as np
import torch

from saqqara.workers.attention.base import CuSeqlens
from saqqara.workers.attention.reference import ReferenceAttention
from saqqara.workers.attention.triton import TritonAttention
from saqqara.workers.kernels import attend, decode, mass, pages

from .kernel_cases import (
    CPU,
    MASS_TOLERANCE,
    TOLERANCES,
    Case,
    close,
    on_cpu,
    paged,
    plain,
    plain_view,
    same,
)
from .layer_checks import check_activation, check_norm, check_rotation, check_step

Check = Callable[[torch.device, torch.dtype, int], float]

_ORACLE = ReferenceAttention()


def check_decode(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Rows of any length, cut into parts or not, with the attention on every token."""
    case = Case(device, dtype, seed)
    view = case.view(case.lengths(4, most=150))
    q, scale = case.queries(4), case.sizes.scale
    expected, expected_mass = _ORACLE.decode_and_mass(plain(q), plain_view(view), scale)
    rows = paged(view)
    whole, no_mass = decode.decode(q, rows, scale)
    assert no_mass is None
    cut, mass_NHT = decode.decode(q, rows, scale, return_mass=True, split_tokens=64)
    assert mass_NHT is not None
    close(mass_NHT, expected_mass, MASS_TOLERANCE)
    _, expected_lse = _ORACLE.decode_and_lse(plain(q), plain_view(view), scale)
    for split_tokens in (64, 512):
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=device)
        decode.decode(q, rows, scale, lse=lse, split_tokens=split_tokens)
        close(lse.exp(), expected_lse.exp(), MASS_TOLERANCE)
    return max(close(out, expected, TOLERANCES[dtype]) for out in (whole, cut))


def check_extend(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """New tokens over kept rows, causal among themselves."""
    case = Case(device, dtype, seed)
    view = case.view(case.lengths(4, most=100))
    cu = case.cu([1, int(case.numbers.integers(2, 40)), 3, 17])
    q, k, v = case.queries(cu.host[-1]), case.keys(cu.host[-1]), case.keys(cu.host[-1])
    out = TritonAttention().extend(q, k, v, cu, view, case.sizes.scale)
    plains = (plain(q), plain(k), plain(v), CuSeqlens.of(cu.lengths, CPU), plain_view(view))
    return close(out, _ORACLE.extend(*plains, case.sizes.scale), TOLERANCES[dtype])


def check_prefill(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Whole prompts, by the kernel that is chosen here, and only their last queries, by ours."""
    case = Case(device, dtype, seed)
    cu = case.cu([1, 33, int(case.numbers.integers(2, 70)), 16])
    last, ends = case.cu([1, 1, 2, 9]), case.cu([1] * 4)  # the ends are cut by their keys
    q, k, v = case.queries(cu.host[-1]), case.keys(cu.host[-1]), case.keys(cu.host[-1])
    worst, backend, scale = 0.0, TritonAttention(), case.sizes.scale
    for cu_q in (cu, last, ends):
        bounds = zip(cu.host[1:], cu_q.lengths, strict=True)
        queries = torch.cat([q[end - count : end] for end, count in bounds])
        out = backend.prefill(queries, k, v, cu_q, cu, scale)[0]
        plains = (plain(queries), plain(k), plain(v), on_cpu(cu_q), on_cpu(cu))
        expected = _ORACLE.prefill(*plains, scale)[0]
        worst = max(worst, close(out, expected, TOLERANCES[dtype]))
    packed = attend.attend(q, k, v, cu.device, cu.device, cu.max_len, scale)
    plains = (plain(q), plain(k), plain(v), on_cpu(cu), on_cpu(cu))
    expected = _ORACLE.prefill(*plains, scale)[0]
    return max(worst, close(packed, expected, TOLERANCES[dtype]))


def check_mass(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """What the last queries, and what all, weighted, pay to each key; several sequences at once."""
    case = Case(device, dtype, seed)
    cu_k = case.cu([90, 1, int(case.numbers.integers(20, 70))])
    k, scale, worst = case.keys(cu_k.host[-1]), case.sizes.scale, 0.0
    for counts in ([8, 1, 20], list(cu_k.lengths)):
        cu_q = case.cu(counts)
        q = case.queries(cu_q.host[-1])
        weights = case.randn(cu_q.host[-1]).float().abs()
        bounds = (cu_q.device, cu_k.device, cu_q.max_len, cu_k.max_len)
        got = mass.mass(q, k, *bounds, scale, weights)
        for n in range(3):
            queries = slice(*cu_q.host[n : n + 2])
            keys = slice(*cu_k.host[n : n + 2])
            plains = (plain(q[queries]), plain(k[keys]), scale, plain(weights[queries]))
            worst = max(worst, close(got[:, keys], _ORACLE.mass(*plains), MASS_TOLERANCE))
        lse = TritonAttention().normalisers(q[: counts[0]], k[:90], scale)
        expected_lse = _ORACLE.normalisers(plain(q[: counts[0]]), plain(k[:90]), scale)
        close(lse.exp(), expected_lse.exp(), MASS_TOLERANCE)
        one = TritonAttention().mass(q[: counts[0]], k[:90], scale)
        alone = _ORACLE.mass(plain(q[: counts[0]]), plain(k[:90]), scale)
        worst = max(worst, close(one, alone, MASS_TOLERANCE))
    return worst


def check_long_mass(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Few queries over so many keys that these are cut into parts."""
    case = Case(device, dtype, seed)
    num_keys = 1024 + int(case.numbers.integers(1, 200))
    q, k = case.queries(4), case.keys(num_keys)
    got = TritonAttention().mass(q, k, case.sizes.scale)
    expected = _ORACLE.mass(plain(q), plain(k), case.sizes.scale)
    return close(got, expected, MASS_TOLERANCE)


def check_fill(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Selected tokens go to pages, the rest of a last page repeats its last token; exact.

    They belong to sequences that begin at different tokens.
    """
    case = Case(device, dtype, seed)
    size, num_tokens = case.sizes.page_tokens, 50
    k, v = case.keys(num_tokens), case.keys(num_tokens)
    stored = [torch.full((12, size, case.sizes.dim), float("nan")).to(k) for _ in range(2)]
    expected = [x.clone() for x in stored]
    indices: list[int] = []
    jobs = []
    for page in case.numbers.permutation(12)[:7].tolist():
        head, count = int(case.numbers.integers(case.sizes.num_heads)), None
        count = int(case.numbers.integers(1, min(size, num_tokens) + 1))
        start = int(case.numbers.integers(num_tokens - count + 1))
        chosen = sorted(case.numbers.choice(num_tokens - start, count, replace=False).tolist())
        jobs.append((page, head, len(indices), count, start))
        indices += chosen
        for t in range(size):
            token = start + chosen[min(t, count - 1)]
            expected[0][page, t], expected[1][page, t] = k[token, head], v[token, head]
    numbers = (torch.tensor(x, dtype=torch.int64, device=device) for x in (jobs, indices))
    pages.fill_pages(k, v, *stored, *numbers)
    for got, wanted in zip(stored, expected, strict=True):
        same(got, wanted)
    return 0.0


def check_append(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """New tokens go where they are told; exact."""
    case = Case(device, dtype, seed)
    k, v = case.keys(6), case.keys(6)
    places = case.numbers.permutation(100)[: 6 * case.sizes.num_heads]
    refs = torch.from_numpy(places.reshape(6, -1)).to(device)
    k_stored, v_stored = case.randn(100, case.sizes.dim), case.randn(100, case.sizes.dim)
    k_expected = k_stored.index_copy(0, refs.view(-1), k.flatten(0, 1))
    v_expected = v_stored.index_copy(0, refs.view(-1), v.flatten(0, 1))
    pages.append_tokens(k, v, k_stored, v_stored, refs)
    same(k_stored, k_expected)
    same(v_stored, v_expected)
    return 0.0


def check_compact(device: torch.device, dtype: torch.dtype, seed: int) -> float:
    """Kept tokens move to the front of their rows, in place, others' pages stay as they are."""
    case = Case(device, dtype, seed)
    size = case.sizes.page_tokens
    view = case.view(case.lengths(3, most=200))
    stored = (view.k_pages, view.v_pages)
    expected = [x.clone() for x in stored]
    entries, starts, counts, indices = [], [], [], list[int]()
    for n, h in np.ndindex(*view.lengths.shape):
        length, table = int(view.lengths[n, h]), view.page_table[n, h].tolist()
        keep = int(case.numbers.integers(0, length + 1))
        chosen = np.sort(case.numbers.choice(length, keep, replace=False)).tolist()
        if keep > 2 and case.numbers.random() < 0.3:
            chosen = list(range(keep))  # nothing moves
        entries.append((n * view.lengths.shape[1] + h) * view.page_table.shape[-1])
        starts.append(len(indices))
        counts.append(keep)
        indices += chosen
        for old, new in zip(stored, expected, strict=True):
            for t in range(-(-keep // size) * size):
                source = chosen[min(t, keep - 1)]
                moved = old[table[source // size], source % size]
                new[table[t // size], t % size] = moved
    numbers = (
        torch.tensor(x, dtype=torch.int64, device=device)
        for x in (entries, indices, starts, counts)
    )
    pages.compact_tokens(*stored, view.page_table.contiguous().view(-1), *numbers)
    for got, wanted in zip(stored, expected, strict=True):
        same(got, wanted)
    return 0.0


CHECKS: dict[str, Check] = {
    "decode": check_decode,
    "decode step": check_step,
    "rotation": check_rotation,
    "norm": check_norm,
    "activation": check_activation,
    "extend": check_extend,
    "prefill": check_prefill,
    "mass": check_mass,
    "mass of long prompts": check_long_mass,
    "fill pages": check_fill,
    "append": check_append,
    "compact": check_compact,
}
