"""What `gpu_check.py` runs, in which order, for how long; at real sizes, and at toy ones."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import gpu_collectives
import gpu_engine
import gpu_kernels
import gpu_reuse
import torch
from gpu_kernels import ROWS_OF_8B, DecodeSizes, LayerSizes
from gpu_models import (
    LLAMA_2_13B,
    LLAMA_3_8B,
    LLAMA_3_8B_QUARTER,
    LLAMA_3_70B_RANK,
    Load,
    Shape,
    small,
)
from gpu_report import Bench, Row

from saqqara.compression.retention import Retention
from saqqara.evaluation.speed.kernel_cases import SERVED
from saqqara.evaluation.speed.kernel_checks import CHECKS

Rows = Callable[[Bench], Iterator[Row]]
BUDGETS = {
    "full": Retention.parse("full"),
    "pyramidkv 25%": Retention.parse("pyramidkv", "25%"),
    "pyramidkv 10%": Retention.parse("pyramidkv", "10%"),
}
_RANK_BUDGETS = {name: BUDGETS[name] for name in ("full", "pyramidkv 25%")}
_OTHER_SEEDS = range(3)


@dataclass(frozen=True)
class Section:
    """A part of the check.

    Attributes:
        name: for `--only`.
        seconds: after which it is killed.
        proves: whether it says if something is computed right: then all of its rows must be `ok`.
        is_first: whether it is of `--first`; else of `--rest`.
        parts: what makes its rows, by name; several run at once, each in its own process.
    """

    name: str
    seconds: float
    proves: bool
    is_first: bool
    parts: Mapping[str, Rows]


@dataclass(frozen=True)
class Sizes:
    """Shapes and loads of all sections."""

    kernels: tuple[str, ...]
    kernel_seeds: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    parity_tokens: int
    copy_bytes: int
    rows: tuple[DecodeSizes, ...]
    layer: LayerSizes
    step: tuple[Shape, Load]
    of_8b: tuple[Shape, Load, tuple[int, ...]]
    of_13b: tuple[Shape, Load]
    most_13b: int
    of_70b: tuple[Shape, Load]
    reused: tuple[Load, int, Shape, Load]


REAL = Sizes(
    kernels=tuple(CHECKS),
    kernel_seeds=tuple(SERVED),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    parity_tokens=24,
    copy_bytes=1 << 30,
    rows=ROWS_OF_8B,
    layer=LayerSizes(),
    step=(LLAMA_3_8B_QUARTER, Load(4096, 100, 64)),
    of_8b=(LLAMA_3_8B, Load(8192, 2048, 8), (512,)),
    of_13b=(LLAMA_2_13B, Load(512, 256, 32)),
    most_13b=256,
    of_70b=(LLAMA_3_70B_RANK, Load(4096, 256, 64)),
    reused=(Load(150, 100, 1), 8, LLAMA_3_8B_QUARTER, Load(8192, 16, 1)),
)
_TINY = Shape("tiny", 32, 48, 2, 4, 2, 61, dim=16)
TOY = Sizes(
    kernels=("append", "fill pages"),
    kernel_seeds=(0,),
    dtypes=(torch.float32,),
    parity_tokens=1,
    copy_bytes=1 << 16,
    rows=(DecodeSizes(2, 40, 2, 2, 16), DecodeSizes(2, 40, 2, 1, 16, is_ragged=True)),
    layer=LayerSizes(48, 4, 16, 32, 48, 2, 2, 16),
    step=(_TINY, Load(8, 12, 1)),
    of_8b=(_TINY, Load(64, 4, 2), (2,)),
    of_13b=(replace(_TINY, num_layers=4), Load(40, 3, 2)),
    most_13b=3,
    of_70b=(_TINY, Load(16, 2, 2)),
    reused=(Load(60, 20, 1), 2, _TINY, Load(64, 4, 1)),
)


def sections(sizes: Sizes, out: Path) -> tuple[Section, ...]:
    """All of them, in order; files go to the folder `out`."""
    served = {
        f"kernel {name}": partial(_kernel, sizes.dtypes[:1], name, sizes.kernel_seeds)
        for name in sizes.kernels
    }
    models = [sizes.of_8b[0], sizes.of_13b[0], sizes.of_70b[0]]
    warm = {f"warm up {shape.name}": partial(_warm_up, shape) for shape in dict.fromkeys(models)}
    others = {
        f"kernel {name}, other sizes": partial(_kernel, sizes.dtypes, name, tuple(_OTHER_SEEDS))
        for name in sizes.kernels
    }
    step, of_70b = sizes.step, sizes.of_70b
    return (
        Section("kernels", 60, True, True, {**served, **warm}),
        _alone("parity", 60, True, True, lambda b: gpu_engine.check_parity(b, sizes.parity_tokens)),
        _alone("reuse", 45, True, True, lambda b: _check_reuse(b, *sizes.reused)),
        _alone(
            *("collectives", 15, False, True),
            lambda b: gpu_collectives.check_sums(b, torch.cuda.device_count()),
        ),
        _alone(
            *("bandwidth", 30, False, True),
            lambda b: gpu_kernels.measure_decode(b, sizes.rows, sizes.copy_bytes),
        ),
        _alone(
            *("step", 130, False, True),
            lambda b: gpu_engine.measure_step(b, *step, out, sizes.copy_bytes),
        ),
        _alone("8b", 95, False, False, lambda b: _measure_8b(b, *sizes.of_8b)),
        _alone("13b", 125, False, False, lambda b: gpu_engine.compare_13b(b, *sizes.of_13b)),
        _alone(
            *("retention", 12, False, False),
            lambda b: gpu_kernels.measure_retention(b, sizes.layer),
        ),
        Section("other-kernels", 22, False, False, others),
        _alone(
            *("13b-largest", 48, False, False),
            lambda b: gpu_engine.compare_largest(b, *sizes.of_13b, sizes.most_13b),
        ),
        _alone("70b", 38, False, False, lambda b: _rank_of_70b(b, *of_70b)),
    )


def _alone(name: str, seconds: float, proves: bool, is_first: bool, rows: Rows) -> Section:
    return Section(name, seconds, proves, is_first, {name: rows})


def _kernel(
    dtypes: tuple[torch.dtype, ...], name: str, seeds: tuple[int, ...], bench: Bench
) -> Iterator[Row]:
    for dtype in dtypes:
        yield from gpu_kernels.check_kernel(bench, name, dtype, seeds)


def _check_reuse(
    bench: Bench, load: Load, new_tokens: int, shape: Shape, longer: Load
) -> Iterator[Row]:
    """First whether it is right, then what it costs."""
    yield from gpu_reuse.check_reuse(bench, load, new_tokens)
    yield from gpu_reuse.measure_reuse(bench, shape, longer)


def _warm_up(shape: Shape, bench: Bench) -> Iterator[Row]:
    """Compile what an engine of a shape's heads launches, for the sections to come."""
    yield gpu_engine.warm_up(bench, small(shape, num_layers=4))


def _measure_8b(bench: Bench, shape: Shape, load: Load, shorter: tuple[int, ...]) -> Iterator[Row]:
    return gpu_engine.measure_retentions(bench, shape, load, BUDGETS, shorter=shorter)


def _rank_of_70b(bench: Bench, shape: Shape, load: Load) -> Iterator[Row]:
    """One rank's shapes; without the exchanges that eight ranks would need in every layer."""
    for row in gpu_engine.measure_retentions(bench, shape, load, _RANK_BUDGETS):
        result = f"{row.result}; extrapolated to 8 GPUs, without communication"
        yield Row(row.what, result, row.numbers, row.state)
