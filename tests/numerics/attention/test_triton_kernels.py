"""The Triton kernels, run by Triton's interpreter, agree with the float32 oracle.

The checks are those that `benchmarks/gpu/gpu_check.py` runs on a GPU;
`evaluation/speed/kernel_checks.py` has them. The interpreter is slow: here are few seeds.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is for Linux only", allow_module_level=True)

from saqqara.evaluation.speed.kernel_checks import CHECKS
from saqqara.workers.attention import fresh
from saqqara.workers.attention.base import CuSeqlens, get_backend
from saqqara.workers.kv.pool import PagePool
from saqqara.workers.kv.prompts import PromptWrite, write_prompts
from saqqara.workers.kv.rows import Rows, compact_rows
from saqqara.workers.kv.store import KVStore

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled: see gpu_check"
)


@interpreted
@pytest.mark.parametrize(
    ("name", "seed"), [(name, n) for name in CHECKS for n in range(1 if "mass" in name else 2)]
)
def test_kernel(name: str, seed: int) -> None:
    CHECKS[name](CPU, torch.float32, seed)


HALF_PRECISION = [("decode", torch.float16), ("compact", torch.float16)]
HALF_PRECISION += [
    (name, torch.bfloat16) for name in ("decode step", "rotation", "norm", "activation", "extend")
]


@interpreted
@pytest.mark.parametrize(("name", "dtype"), HALF_PRECISION)
def test_kernel_in_half_precision(name: str, dtype: torch.dtype) -> None:
    CHECKS[name](CPU, dtype, 7)


@interpreted
def test_a_check_notices_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token too few of each row: the oracle must not agree."""
    from saqqara.workers.kernels import decode

    right = decode.decode

    def wrong(q: torch.Tensor, rows: decode.PagedRows, *args: object, **kwargs: object) -> object:
        shorter = decode.PagedRows(
            rows.k_pages,
            rows.v_pages,
            rows.page_table,
            (rows.lengths - 1).clamp(min=0),
            rows.max_length,
        )
        return right(q, shorter, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(decode, "decode", wrong)
    with pytest.raises(AssertionError, match=r"numbers of \[4, .* deviate, by up to"):
        CHECKS["decode"](CPU, torch.float32, 0)


@interpreted
@pytest.mark.parametrize("seed", range(2))
def test_a_store_moved_by_kernels_holds_what_the_other_holds(seed: int) -> None:
    """The same random life of some slots, twice: tables, lengths and contents stay equal."""
    numbers = np.random.default_rng(seed)
    torch.manual_seed(seed)
    page_tokens = int(numbers.choice([4, 16]))
    stores = [
        KVStore(2, 2, 4, 80, page_tokens, 96, 8, torch.float32, CPU, mirrored=True, kernels=kernels)
        for kernels in (False, True)
    ]
    for _ in range(30):
        slot, layer = int(numbers.integers(4)), int(numbers.integers(2))
        kept = stores[0].kept(slot)
        action = numbers.choice(["write", "append", "compact", "compact", "fork", "free"])
        target = int(numbers.integers(4))
        can_fork = target != slot and not stores[0].kept(target).any()
        n = int(numbers.integers(1, 40))
        k, v = torch.randn(n, 2, 8), torch.randn(n, 2, 8)
        chosen = [_subset(numbers, n) for _ in range(2)]
        alike = np.flatnonzero(kept[layer] == kept[layer, 0])
        rows = Rows(layer, np.full_like(alike, slot), alike)
        keep = int(numbers.integers(kept[layer, 0] + 1))
        places = torch.stack([_subset(numbers, int(kept[layer, 0]), keep) for _ in alike])
        num_new = int(numbers.integers(1, 5))
        answers = []
        for store in stores:
            answer: object = None
            if action == "write" and not kept[layer].any():
                answer = store.write(slot, layer, k, v, chosen if n % 2 else None)
            elif action == "append" and kept.max() + num_new <= 96:
                plan = store.begin_append(np.array([slot]), np.array([num_new]))
                if plan is not None:
                    fresh = torch.Generator().manual_seed(n)
                    for each in range(2):
                        new = torch.randn(2, num_new, 2, 8, generator=fresh)
                        store.append(plan, each, new[0], new[1])
                answer = plan is None
            elif action == "compact":
                answer = compact_rows(store, rows, places)
            elif action == "fork" and can_fork:
                store.fork(slot, target)
            elif action == "free":
                store.free(slot)
            answers.append(answer)
        assert answers[0] == answers[1], action
        for store in stores:
            store.check_integrity()
        _assert_same(*stores)


@interpreted
def test_prompts_written_together_are_as_one_by_one() -> None:
    torch.manual_seed(0)
    k, v = torch.randn(31, 2, 8), torch.randn(31, 2, 8)
    selected = torch.tensor([[0, 3, 4, 9, 10], [1, 2, 3, 4, 8]])
    ragged = [torch.tensor([2, 5]), torch.arange(6)]
    writes = [
        PromptWrite(2, 0, 9, None),
        PromptWrite(0, 9, 11, selected),
        PromptWrite(3, 20, 6, ragged),
        PromptWrite(1, 26, 5, None),
    ]
    for num_pages, fitting in ((40, 4), (13, 3), (12, 2), (9, 1), (5, 0)):  # 6, 4, 3 and 4 pages
        stores = [
            KVStore(1, 2, 4, num_pages, 4, 16, 8, torch.float32, CPU, mirrored=True, kernels=x)
            for x in (False, True)
        ]
        assert [write_prompts(store, 0, k, v, writes) for store in stores] == [fitting] * 2
        for store in stores:
            store.check_integrity()
        _assert_same(*stores)
        if fitting == 4:
            stored, _ = stores[1].read(0, 0, 1)
            assert torch.equal(stored, k[9 + selected[1], 1])


@interpreted
def test_pools_may_have_more_numbers_than_32_bits_count() -> None:
    """The same work in the last pages of such a pool and in a small one.

    Memory is only taken for pages that are touched.
    """
    from saqqara.workers.kernels import attend, decode, pages

    page_tokens, dim, num_used = 64, 128, 12
    torch.manual_seed(0)
    k, v = (torch.randn(70, 2, dim, dtype=torch.float16) for _ in range(2))
    q = torch.randn(2, 4, dim, dtype=torch.float16)
    jobs = torch.tensor([[0, 0, 0, 64, 0], [1, 0, 64, 6, 0], [2, 1, 0, 40, 0], [3, 1, 0, 9, 30]])
    table = torch.tensor([[[0, 1], [2, 5]], [[3, 6], [2, 7]]], dtype=torch.int32)
    lengths = torch.tensor([[71, 41], [10, 40]], dtype=torch.int32)
    cu = torch.tensor([0, 1, 2], dtype=torch.int32)
    found = []
    for num_pages in (num_used, 2**31 // (page_tokens * dim) + num_used):
        pool, first = (
            PagePool(num_pages, page_tokens, dim, torch.float16, CPU),
            num_pages - num_used,
        )
        stored, here = (pool.k_pages, pool.v_pages), jobs.clone()
        here[:, 0] += first
        pages.fill_pages(k, v, *stored, here, None)
        refs = torch.tensor([[8, 9], [10, 11]]) + first
        k_tokens, v_tokens = (x.view(-1, dim) for x in stored)
        pages.append_tokens(k[:2], v[:2], k_tokens, v_tokens, refs * page_tokens + 3)
        rows = decode.PagedRows(*stored, table + first, lengths, 71)
        out, _ = decode.decode(q, rows, 0.1)
        attended = attend.attend(q, k[:2], v[:2], cu, cu, 1, 0.1, rows)
        numbers = (torch.tensor(x) for x in ([0], [1, 5, 66, 70], [0], [4]))
        pages.compact_tokens(*stored, (table + first).view(-1), *numbers)
        found.append((out, attended, *(x[first:].clone() for x in stored)))
    assert found[0][2].count_nonzero() > 100 * dim
    for near, far in zip(*found, strict=True):
        assert torch.equal(near, far)


def _subset(numbers: np.random.Generator, n: int, count: int | None = None) -> torch.Tensor:
    if count is None:
        count = int(numbers.integers(0, n + 1))
    return torch.from_numpy(np.sort(numbers.choice(n, count, replace=False)))


def _assert_same(one: KVStore, other: KVStore) -> None:
    assert np.array_equal(one.table.kept, other.table.kept)
    for slot, layer, head in np.ndindex(*one.table.kept.shape):
        for x, y in zip(one.read(slot, layer, head), other.read(slot, layer, head), strict=True):
            assert torch.equal(x, y), (slot, layer, head)


def test_prefill_kernels_are_tried_in_order_and_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that refuses the heads' grouping, or computes something else, is passed over."""
    calls: list[str] = []
    right: Any = fresh._sdpa()

    def kernel(name: str, error: Exception | None = None, factor: float = 1.0) -> fresh.Fresh:
        def attend(*args: Any) -> torch.Tensor:
            calls.append(name)
            if error is not None:
                raise error
            return torch.as_tensor(factor * right(*args))

        return attend

    candidates = {
        "absent": lambda: fresh._flash(importlib.import_module("no_such_kernels").attend),
        "no groups": lambda: kernel("no groups", ValueError("num_heads must match\nand more")),
        "wrong": lambda: kernel("wrong", factor=1.5),
        "taken": lambda: kernel("taken"),
        "never": lambda: kernel("never"),
    }
    monkeypatch.setattr(fresh, "_CANDIDATES", candidates)
    monkeypatch.setattr(fresh, "_no_flash", lambda _: None)
    attention, cu = fresh.FreshAttention(), CuSeqlens.of([3, 5], CPU)
    q, k = torch.randn(8, 4, 16), torch.randn(8, 2, 16)
    with caplog.at_level("INFO"):
        for _ in range(2):
            torch.testing.assert_close(attention(q, k, k, cu, 0.25), right(q, k, k, cu, 0.25))
    assert calls == ["no groups", "wrong", "taken", "taken", "taken"]
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("prefill attention: taken (auto: it computes right; not absent: No")
    assert "not no groups: num_heads must match; not wrong: its outputs are" in message


def test_a_kernel_that_forgets_windows_or_caps_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Flash attention is told both; what computes something else is not taken."""
    right: Any = fresh._sdpa()
    told: list[Any] = []

    def function(q: Any, k: Any, v: Any, *bounds: Any, **how: Any) -> torch.Tensor:
        told.append((how["window_size"], how["softcap"]))
        cu = CuSeqlens.of(bounds[0].diff().tolist(), CPU)
        window = how["window_size"][0] + 1
        return torch.as_tensor(right(q, k, v, cu, how["softmax_scale"], window, how["softcap"]))

    candidates = {
        "no windows": lambda: lambda *args: right(*args[:5], 0, args[6]),
        "no caps": lambda: lambda *args: right(*args[:6], 0.0),
        "taken": lambda: fresh._flash(function),
    }
    monkeypatch.setattr(fresh, "_CANDIDATES", candidates)
    monkeypatch.setattr(fresh, "_no_flash", lambda _: None)
    attention, cu = fresh.FreshAttention(softcap=0.5), CuSeqlens.of([3, 9], CPU)
    q, k = torch.randn(12, 4, 16), torch.randn(12, 2, 16)
    with caplog.at_level("INFO"):
        out = attention(q, k, k, cu, 0.25, 4)
    torch.testing.assert_close(out, right(q, k, k, cu, 0.25, 4, 0.5))
    assert told == [((6, 0), 0.5), ((3, 0), 0.5)]
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("prefill attention of windows: taken")
    assert "not no windows: its outputs are" in message
    assert "not no caps: its outputs are" in message
    monkeypatch.setattr(fresh, "_CANDIDATES", {})
    name, _, _ = fresh.choose(fresh.Kind(CPU, torch.float32, 2, 1, 64, windowed=True))
    assert name == "our kernel of extension"


def test_without_kernels_prompts_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU neither cuDNN nor torch's varlen runs, as on GPUs that they were not built for."""
    monkeypatch.setattr(fresh, "_no_flash", lambda _: None)
    name, _, reason = fresh.choose(fresh.Kind(CPU, torch.bfloat16, 2, 1, 64))
    assert name == "torch SDPA, one sequence at a time"
    for kernel in ("flash-attn 3", "flash-attn 2", "cuDNN SDPA", "torch varlen"):
        assert f"not {kernel}: " in reason


def test_the_backend_says_why_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"attention_backend='triton'.*the device is cpu"):
        get_backend("triton", CPU, torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    backend, reason = get_backend("triton", CPU, torch.float32)
    assert (backend.name, reason) == ("triton", "attention_backend='triton'")


@pytest.mark.parametrize(
    "cases", [(), pytest.param(("--all",), marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_every_kernel_compiles_for_a_gpu(cases: tuple[str, ...], tmp_path: Path) -> None:
    """Triton compiles for a GPU that is not there, so mistakes that the interpreter forgives show.

    In a process of its own: this one's kernels are interpreted.
    """
    script = Path(__file__).parents[2] / "support" / "compile_kernels.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, str(script), *cases],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    compiled = set(done.stdout.split())
    assert compiled == {
        "_decode_kernel", "_merge_kernel", "_token_mass_kernel", "_attend_kernel",
        "_queries_kernel", "_keys_kernel", "_fill_kernel", "_append_kernel", "_compact_kernel",
        "_lengthen_kernel", "_list_kernel", "_rotate_kernel", "_rms_norm_kernel",
        "_silu_mul_kernel",
    }  # fmt: skip
