"""What the engine is compared with on a GPU: `generate` of transformers, and DeepSpeed's.

Both take the whole batch at once, all prompts of one length, with random weights of the same shape
made on the device. Accelerate places the model as `device_map="auto"` does: on one device whole.
"""

import gc
import importlib.util
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from gpu_models import Load, Shape
from gpu_report import GIB, Bench, OutOfTimeError, Row, failure
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

SAME, LARGEST = "same batch", "largest batch"
_SLACK_BYTES = 3 * GIB
_SMALLER = 0.85  # of a batch that did not fit
_WARM_UP_TOKENS = 4
_RUN_SECONDS = 40.0


# How `generate` keeps keys and values: its default, and room for the whole length from the start.
CACHES: dict[str, dict[str, Any]] = {
    "dynamic cache": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, compiled": {"cache_implementation": "static"},
}


class _Timer(StoppingCriteria):  # type: ignore[misc]
    """Ends a generation whose time is over, or that has so many tokens."""

    def __init__(self, bench: Bench, most_tokens: int) -> None:
        self._deadline = bench.deadline.part(_RUN_SECONDS)
        self._most_tokens = most_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._deadline.check()
        is_over = input_ids.shape[1] >= self._most_tokens
        return torch.full((len(input_ids),), is_over, device=input_ids.device)


def release() -> None:
    """Give back the memory of models that nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def random_model(bench: Bench, shape: Shape, load: Load) -> Iterator[Any]:
    """A transformers model with random weights, as Accelerate places it where that is installed."""
    with torch.device(bench.device):
        model = AutoModelForCausalLM.from_config(shape.config(load.tokens), dtype=bench.dtype)
    model.eval()
    if importlib.util.find_spec("accelerate") is not None:
        from accelerate import dispatch_model

        place: int | str = bench.device.index or 0 if bench.device.type == "cuda" else "cpu"
        model = dispatch_model(model, device_map={"": place})
    yield model


def timed(
    bench: Bench, model: Any, shape: Shape, load: Load, batch: int, cache: dict[str, Any]
) -> float:
    """Generated tokens per second of one batch, prefill included.

    The warm-up has the run's own lengths, for which a static cache is made and code is compiled.
    """
    ids = torch.tensor(load.prompts(shape.vocab, batch), device=bench.device)
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    seconds = 0.0
    for new_tokens in (min(_WARM_UP_TOKENS, load.new_tokens), load.new_tokens):
        timer = StoppingCriteriaList([_Timer(bench, load.prompt_tokens + new_tokens)])
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, max_new_tokens=load.new_tokens, stopping_criteria=timer, **settings, **cache
            )
        made = out.shape[1] - ids.shape[1]
        assert made == new_tokens, f"{made} tokens came, not {new_tokens}"
        out.tolist()  # waits for the device
        seconds = time.perf_counter() - started
    return batch * load.new_tokens / seconds


def fitting_batch(bench: Bench, shape: Shape, load: Load, weight_bytes: int) -> int:
    """Sequences that should fit the cap: keys and values at full length, activations of prefill."""
    kv_bytes = load.tokens * shape.kv_token_bytes(bench.dtype)
    widths = 6 * shape.hidden + 2 * shape.inner
    activation_bytes = load.prompt_tokens * widths * bench.dtype.itemsize
    free = bench.cap_bytes - _SLACK_BYTES - weight_bytes
    if bench.device.type != "cuda":
        return load.batch
    return max(1, free // (kv_bytes + activation_bytes))


def _measured(
    bench: Bench, what: str, model: Any, shape: Shape, load: Load, batch: int, cache: dict[str, Any]
) -> Row:
    """Tokens per second of a batch, or of the first smaller one that fits."""
    while True:
        bench.deadline.check()
        try:
            speed = timed(bench, model, shape, load, batch, cache)
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                return Row(what, "one sequence does not fit the cap", state="failed")
            batch = max(1, int(batch * _SMALLER))
        except OutOfTimeError:
            return Row(what, f"batch {batch} takes longer than it may", state="skipped")
        except Exception as error:
            return failure(what, error)
        else:
            numbers = {"tokens_per_second": speed, "batch": batch}
            return Row(f"{what}, batch {batch}", f"{speed:.0f} tokens/s", numbers)
        release()


def transformers_rows(
    bench: Bench, shape: Shape, load: Load, size: str, caches: Sequence[str] = tuple(CACHES)
) -> Iterator[Row]:
    """`generate` of transformers with each kind of cache, at the load's batch or the largest."""
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    name = f"{shape.name}, transformers" + (" + Accelerate" if has_accelerate else "")
    with random_model(bench, shape, load) as model:
        batch = _batch(bench, shape, load, model, size)
        for cache in caches:
            what = f"{name}, {cache}, {size}"
            yield _measured(bench, what, model, shape, load, batch, CACHES[cache])


def _batch(bench: Bench, shape: Shape, load: Load, model: Any, size: str) -> int:
    weight_bytes = sum(weight.nbytes for weight in model.parameters())
    return load.batch if size == SAME else fitting_batch(bench, shape, load, weight_bytes)


def deepspeed_rows(bench: Bench, shape: Shape, load: Load, size: str) -> Iterator[Row]:
    """DeepSpeed's inference engine with its own kernels, where it is installed."""
    name = f"{shape.name}, DeepSpeed inference"
    if importlib.util.find_spec("deepspeed") is None:
        yield Row(name, "not installed", state="skipped")
        return
    import deepspeed

    with random_model(bench, shape, load) as model:
        engine = deepspeed.init_inference(
            model, dtype=bench.dtype, replace_with_kernel_inject=True, max_out_tokens=load.tokens
        )
        batch = _batch(bench, shape, load, engine, size)
        yield _measured(bench, f"{name}, {size}", engine, shape, load, batch, {})
