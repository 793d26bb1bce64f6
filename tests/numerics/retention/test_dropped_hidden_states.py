"""Propagation saves prefill work: hidden states of unselected tokens are gone, and nothing else.

The oracle (`support/slow_llama.py`) walks the layers of a transformers model with loops and drops
hidden states by the published definition (`support/definitions.py`). The real worker must say the
same, alone, in a batch, in layer ranges, and after a preemption.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.definitions import Rules, once, pyramidinfer
from support.plans import new_sequence, prefill_plan, run_greedy
from support.slow_llama import NEAR_CUT, SlowLlama, Weights
from support.tiny import VOCAB, save_tiny
from torch import Tensor

from saqqara import LLM, SamplingParams
from saqqara.compression.retention import Retention
from saqqara.compression.selecting import surviving_tokens
from saqqara.configs.schema import EngineConfig
from saqqara.workers.attention.cpu import unavailable_reason
from saqqara.workers.plan import DecodeItem, PrefillGroup, SampledToken, SamplingSpec, StepPlan
from saqqara.workers.worker import Worker

LAYERS, HEADS = 6, 3
TOKEN_BYTES = 2 * 16 * 4  # key and value of one token in one row, head_dim 16, fp32
ALL_LOGPROBS = SamplingSpec(temperature=0.0, num_logprobs=VOCAB)
NUM_TOKENS = 5
# fp32 with another order of summation through six layers: logits of size ~10 agree to about 1e-5.
TOLERANCE = 2e-4
NO_KERNELS = unavailable_reason(torch.device("cpu"), torch.float32)
NATIVE = pytest.param(
    "cpu", marks=pytest.mark.skipif(NO_KERNELS is not None, reason=f"no kernels: {NO_KERNELS}")
)

STAGES = {
    "pyramidinfer": {"kind": "pyramidinfer", "rho": 0.5, "min_context": 8, "recent_ratio": 0.2},
    "every-other": {"kind": "pyramidinfer", "rho": 0.3, "interval": 2, "min_context": 4},
    "no-recent": {"kind": "pyramidinfer", "rho": 0.4, "recent_ratio": 0.0, "min_context": 4},
    "once": {"kind": "once", "layer": 2, "keep": 0.4, "window": 6},
    "once-avg": {"kind": "once", "layer": 0, "keep": 0.5, "window": 3, "pooling": "avg"},
}


def propagating(name: str) -> Retention:
    return Retention.parse({"propagate": STAGES[name]})


def slow_llama(model: Any, retention: Retention) -> SlowLlama:
    assert retention.propagate is not None
    settings = retention.propagate.to_dict()
    definition = once(settings) if settings["kind"] == "once" else pyramidinfer(settings)
    return SlowLlama(Weights(model), Rules(None, propagate=definition))


def stored(slow: SlowLlama, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values [m, D] of one row of the oracle."""
    row = slow.rows[layer][head]
    keys, values = [entry.key for entry in row], [entry.value for entry in row]
    return torch.stack(keys).float(), torch.stack(values).float()


def prompts(lengths: tuple[int, ...] = (70, 9, 41)) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(3, VOCAB, length).tolist() for length in lengths]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("deep")
    return folder, save_tiny("llama-gqa", folder, num_layers=LAYERS)


def make_worker(folder: Path, **settings: Any) -> Worker:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "page_tokens": 4}
    return Worker.local(EngineConfig(model=str(folder), **{**defaults, **settings}).for_worker())


def all_logprobs(tokens: list[SampledToken]) -> Tensor:
    rows = torch.empty(len(tokens), VOCAB)
    for row, token in zip(rows, tokens, strict=True):
        assert token.logprobs is not None
        row[list(token.logprobs.top_ids)] = torch.tensor(token.logprobs.top_logprobs)
    return rows


@pytest.mark.parametrize("attention_backend", ["torch", "reference", NATIVE])
@pytest.mark.parametrize("name", STAGES)
def test_the_worker_says_what_a_loop_that_drops_hidden_states_says(
    name: str, attention_backend: str, tiny: tuple[Path, Any]
) -> None:
    folder, model = tiny
    retention = propagating(name)
    worker = make_worker(folder, attention_backend=attention_backend, linear_chunk_tokens=16)
    outputs = run_greedy(worker, prompts(), NUM_TOKENS, sampling=ALL_LOGPROBS, retention=retention)
    num_dropped = 0
    for prompt, tokens in zip(prompts(), outputs, strict=True):
        slow = slow_llama(model, retention)
        expected, logits = slow.greedy(prompt, NUM_TOKENS)
        assert slow.cuts.closest > NEAR_CUT, (
            "the prompt is no test: rounding decides what is dropped"
        )
        entered = [len(rows[0]) - NUM_TOKENS + 1 for rows in slow.rows]
        assert entered == list(retention.layer_tokens(len(prompt), LAYERS))
        num_dropped += LAYERS * len(prompt) - sum(entered)
        assert [t.token_id for t in tokens] == expected
        torch.testing.assert_close(
            all_logprobs(tokens), logits.float().log_softmax(-1), atol=TOLERANCE, rtol=0
        )
    assert num_dropped > 0


@pytest.mark.parametrize("name", ["pyramidinfer", "once"])
def test_pages_hold_the_tokens_that_entered(name: str, tiny: tuple[Path, Any]) -> None:
    """Keys are rotated at their original positions: they equal the oracle's, which never moves."""
    folder, model = tiny
    retention = propagating(name)
    worker = make_worker(folder)
    [prompt] = prompts((70,))
    result = worker.execute(prefill_plan(worker, [new_sequence(0, prompt, retention=retention)]))
    counts = np.frombuffer(result.kept[0].counts, dtype=np.int32).reshape(LAYERS, HEADS)
    assert (counts == retention.row_tokens(len(prompt), LAYERS, HEADS)).all()
    slow = slow_llama(model, retention)
    slow.prefill(prompt)
    for layer in range(LAYERS):
        for head in range(HEADS):
            got = worker.kv.read(0, layer, head)
            torch.testing.assert_close(got, stored(slow, layer, head), atol=TOLERANCE, rtol=1e-4)


def test_fewer_tokens_are_computed(tiny: tuple[Path, Any], monkeypatch: Any) -> None:
    """Layer l projects what entered it and finishes only what goes on: counted row by row."""
    folder, _ = tiny
    worker = make_worker(folder)
    retention = propagating("pyramidinfer")
    finished = [0] * LAYERS
    for number, layer in enumerate(worker._shard.part.decoder.layers):

        def finish(
            *args: Any, _number: int = number, _of: Any = layer.finish, **kwargs: Any
        ) -> Any:
            finished[_number] += len(args[0])
            return _of(*args, **kwargs)

        monkeypatch.setattr(layer, "finish", finish)
    new = [new_sequence(slot, p, retention=retention) for slot, p in enumerate(prompts())]
    result = worker.execute(prefill_plan(worker, new))
    entered = np.sum([retention.entering_tokens(len(p), LAYERS) for p in prompts()], axis=0)
    assert result.prefill_layer_tokens == entered.sum() < LAYERS * sum(map(len, prompts()))
    assert finished == [*entered[1:].tolist(), len(new)]  # the last layer: one token per prompt
    full = [new_sequence(slot + 4, p) for slot, p in enumerate(prompts())]
    result = worker.execute(prefill_plan(worker, full, step=1))
    assert result.prefill_layer_tokens == LAYERS * sum(map(len, prompts()))


def test_batched_equals_alone_and_layer_ranges_equal_one(tiny: tuple[Path, Any]) -> None:
    folder, _ = tiny
    worker = make_worker(folder)
    for name in ("pyramidinfer", "once"):
        retention = propagating(name)
        together = run_greedy(
            worker, prompts(), NUM_TOKENS, sampling=ALL_LOGPROBS, retention=retention
        )
        for prompt, expected in zip(prompts(), together, strict=True):
            [alone] = run_greedy(
                worker, [prompt], NUM_TOKENS, sampling=ALL_LOGPROBS, retention=retention
            )
            assert [t.token_id for t in alone] == [t.token_id for t in expected]
            torch.testing.assert_close(
                all_logprobs(alone), all_logprobs(expected), atol=TOLERANCE, rtol=0
            )
        new = tuple(new_sequence(n, p, retention=retention) for n, p in enumerate(prompts()))
        slots = tuple(n.slot for n in new)
        parked, results = [], []
        for layer in range(LAYERS):
            group = PrefillGroup(slots, layer, layer + 1)
            plan = StepPlan(layer, new=() if layer else new, prefill=(group,))
            results.append(worker.execute(plan))
            parked.append(results[-1].memory.parked_activation_bytes)
        got = [s.token_id for s in results[-1].sampled]
        assert got == [tokens[0].token_id for tokens in together]
        entered = np.sum([retention.entering_tokens(len(p), LAYERS) for p in prompts()], axis=0)
        per_token = parked[0] / entered[1]
        assert parked == [per_token * count for count in entered[1:]] + [0]
        worker.execute(StepPlan(LAYERS, free=slots))
        worker.check_integrity()


def test_the_meter_sees_fewer_keys_in_every_layer(tiny: tuple[Path, Any]) -> None:
    """At its peak a rank holds one layer's fresh keys and values and the pages written so far."""
    folder, _ = tiny
    worker = make_worker(folder, page_tokens=1)
    [prompt] = prompts((70,))
    retention = propagating("every-other")
    new = new_sequence(0, prompt, retention=retention)
    memory = worker.execute(prefill_plan(worker, [new])).memory
    entered = retention.entering_tokens(len(prompt), LAYERS)
    peak = max(entered[layer] + sum(entered[: layer + 1]) for layer in range(LAYERS))
    assert memory.prefill_kv_bytes_peak == peak * HEADS * TOKEN_BYTES
    assert memory.parked_activation_bytes == 0


def test_a_budget_on_top_cuts_what_entered(tiny: tuple[Path, Any]) -> None:
    """Streaming keeps the sinks and the last of the tokens that entered, read from the pages."""
    folder, model = tiny
    [prompt] = prompts((70,))
    spec = {"method": "streaming", "budget": 50, "window": 4, "propagate": STAGES["pyramidinfer"]}
    retention = Retention.parse(spec)
    worker = make_worker(folder)
    worker.execute(prefill_plan(worker, [new_sequence(0, prompt, retention=retention)]))
    slow = slow_llama(model, retention)
    slow.prefill(prompt)
    counts = retention.layer_tokens(len(prompt), LAYERS)
    entered = retention.entering_tokens(len(prompt), LAYERS)
    assert counts == tuple(min(50, count) for count in entered)
    assert min(entered) < 50 < max(entered)
    for layer, keep in enumerate(counts):
        for head in range(HEADS):
            entered_keys, _ = stored(slow, layer, head)
            expected = torch.cat([entered_keys[:4], entered_keys[len(entered_keys) - keep + 4 :]])
            keys, _ = worker.kv.read(0, layer, head)
            torch.testing.assert_close(keys, expected, atol=TOLERANCE, rtol=1e-4)
    worker.check_integrity()


def test_scores_and_resumed_tokens_follow_what_was_kept(tiny: tuple[Path, Any]) -> None:
    """Teacher-forced tokens stand at their own positions, after rows of different lengths."""
    folder, model = tiny
    retention = propagating("pyramidinfer")
    worker = make_worker(folder)
    context, continuation = prompts()[0], prompts()[2][:7]
    new = new_sequence(3, context, continuation, retention=retention, score=True)
    results = [worker.execute(prefill_plan(worker, [new]))]
    items = (
        DecodeItem(3, len(context), 3, sample=False),
        DecodeItem(3, len(context) + 3, 3, sample=False),
    )
    for step, item in enumerate(items):
        results.append(worker.execute(StepPlan(step + 1, decode=(item,))))
    got = [logprob for r in results for s in r.scored for logprob in s.logprobs]
    slow = slow_llama(model, retention)
    rows = [slow.prefill(context)]
    for place, token in enumerate(continuation[:-1]):
        rows.append(slow.decode(token, len(context) + place))
    table = torch.stack(rows).float().log_softmax(-1)
    expected = table.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got), expected, atol=TOLERANCE, rtol=0)


def test_selection_is_exact_given_the_scores() -> None:
    """Sinks and recent tokens stay whatever they score; of equal scores the later token wins."""
    scores = torch.tensor([0.0, 0.1, 0.5, 0.2, 0.5, 0.5, 0.3])
    assert surviving_tokens(scores, 6, num_recent=2, sinks=2).tolist() == [0, 1, 4, 5, 7, 8]
    assert surviving_tokens(scores, 4, num_recent=2, sinks=0).tolist() == [4, 5, 7, 8]
    assert surviving_tokens(scores, 9, num_recent=2, sinks=2).tolist() == list(range(9))
    assert surviving_tokens(scores, 2, num_recent=2, sinks=0).tolist() == [7, 8]


def test_preempted_sequences_resume_as_if_never_interrupted(
    tmp_path: Path, demo_model: Path
) -> None:
    save_tiny("llama-gqa", tmp_path, tokenizer_of=demo_model, num_layers=LAYERS)
    rng = np.random.default_rng(1)
    many = [rng.integers(20, 40_000, rng.integers(20, 60)).tolist() for _ in range(12)]
    sampling = SamplingParams(temperature=0.8, seed=3, max_tokens=24, ignore_eos=True)
    settings: dict[str, Any] = {
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 128,
        "page_tokens": 4,
        "retention": {"propagate": STAGES["pyramidinfer"]},
        "check_integrity": True,
    }
    with LLM(str(tmp_path), max_num_seqs=1, **settings) as llm:
        alone = llm.generate(prompt_token_ids=many, sampling_params=sampling)
    page_bytes = 4 * 2 * 16 * 4
    tight = 3 * LAYERS * HEADS * 21 * page_bytes / 1024**3  # three sequences at their longest
    settings |= {"kv_memory_gib": tight, "expected_output_tokens": 1}
    with LLM(str(tmp_path), max_num_seqs=12, **settings) as llm:
        preempted = llm.generate(prompt_token_ids=many, sampling_params=sampling)
        report = llm.report()
    assert report.num_preemptions > 0
    assert report.pages_leaked == 0
    assert [o.outputs[0].token_ids for o in preempted] == [o.outputs[0].token_ids for o in alone]
