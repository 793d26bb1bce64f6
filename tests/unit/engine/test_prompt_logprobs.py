"""Log-probabilities of prompts, and what a request kept, over a replica without a model."""

import pickle
from collections.abc import Mapping
from typing import Any

import pytest
from support.fake_model import SPEC, Ascii, greedy
from support.fake_replica import FakeReplica, make_workers, token_logprob

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.outcome import KVUsage
from saqqara.cluster.request import Request, RequestOutput
from saqqara.configs.schema import EngineConfig

LAYERS = 4
ROWS = LAYERS * 2  # layers and kv heads of the fake model


def make_engine(num_pages: int = 1000, lookahead: int = 1, **settings: Any) -> Engine:
    config = EngineConfig.model_validate(
        {"model": "fake", "max_num_seqs": 8, "executor": "ray", "check_integrity": True} | settings
    )
    replica = FakeReplica(make_workers(num_pages, stages=(4,)))
    return Engine(config, replica, Tokenizer(Ascii()), SPEC, lookahead=lookahead)


def finished(engine: Engine) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            if output.finished:
                outputs[output.request_id] = output
    return outputs


def logprobs_of(output: RequestOutput) -> list[float | None]:
    assert output.prompt_logprobs is not None
    ids = output.prompt_token_ids
    return [
        None if entry is None else next(iter(entry.values())).logprob
        for entry, token_id in zip(output.prompt_logprobs, ids, strict=True)
        if entry is None or next(iter(entry)) == token_id
    ]


def test_they_come_with_the_first_token_and_name_the_prompts_own() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(max_tokens=3, prompt_logprobs=0), stream=True))
    outputs = [o for o in iter_outputs(engine) if isinstance(o, RequestOutput)]
    ids = list(outputs[0].prompt_token_ids)
    expected = [None, *(pytest.approx(token_logprob(ids[:p], ids[p])[0]) for p in range(1, 6))]
    assert len(outputs) == 3
    for output in outputs:
        assert logprobs_of(output) == expected
    entries = outputs[-1].prompt_logprobs
    assert entries is not None
    assert entries[-1] == entries[5]
    assert entries[1:3] == [entries[1], entries[2]]
    with pytest.raises(IndexError):
        entries[6]
    assert pickle.loads(pickle.dumps(list(entries))) == list(entries)


def iter_outputs(engine: Engine) -> list[Any]:
    outputs: list[Any] = []
    while engine.has_unfinished():
        outputs += engine.step()
    return outputs


def test_nobody_who_does_not_ask_gets_any() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(max_tokens=3)))
    assert finished(engine)["r"].prompt_logprobs is None


def test_choices_share_them_and_they_are_computed_once() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(n=3, max_tokens=3, prompt_logprobs=0)))
    output = finished(engine)["r"]
    assert len(output.outputs) == 3
    assert len(logprobs_of(output)) == 6
    assert engine._executor.num_prompts_scored == 1  # type: ignore[attr-defined]


def test_a_resumed_sequence_keeps_them_and_does_not_ask_again() -> None:
    prompts = [f"prompt {i}" for i in range(8)]
    found: list[Mapping[str, Any]] = []
    for num_pages in (1000, 8 * 11):
        engine = make_engine(num_pages, expected_output_tokens=1)
        for prompt in prompts:
            sampling = greedy(max_tokens=20, prompt_logprobs=0)
            engine.add(Request(prompt, prompt, sampling))
        outputs = finished(engine)
        found.append({name: logprobs_of(output) for name, output in outputs.items()})
        scored = engine._executor.num_prompts_scored  # type: ignore[attr-defined]
        assert scored == len(prompts), "each prompt once, however often it was prefilled"
    assert engine.report().num_preemptions > 0
    assert found[0] == found[1]


def test_a_restart_of_the_workers_keeps_them() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(max_tokens=5, prompt_logprobs=0), stream=True))
    engine.step()
    replica = FakeReplica(make_workers(1000, stages=(4,)))
    engine.restart(replica)
    assert len(logprobs_of(finished(engine)["r"])) == 6
    assert replica.num_prompts_scored == 0


def test_a_retention_that_propagates_is_refused() -> None:
    engine = make_engine()
    request = Request("r", "hello", greedy(prompt_logprobs=1), retention="pyramidinfer")
    with pytest.raises(ValueError, match=r"^prompt_logprobs: with a retention that propagates"):
        engine.add(request)
    assert not engine.has_unfinished()


def test_an_echo_of_token_ids_is_decoded() -> None:
    engine = make_engine()
    engine.add(Request("ids", [*map(ord, "hi")], greedy(max_tokens=1), echo=True))
    cut = greedy(max_tokens=1, truncate_prompt_tokens=2, truncation_side="right")
    engine.add(Request("cut", [*map(ord, "hello")], cut, prompt_text="hello", echo=True))
    engine.add(Request("text", [*map(ord, "hi")], greedy(max_tokens=1), prompt_text="Hi"))
    engine.add(Request("none", [*map(ord, "hi")], greedy(max_tokens=1)))
    outputs = finished(engine)
    shown = [outputs[name].prompt for name in ("ids", "cut", "text", "none")]
    assert shown == ["hi", "he", "Hi", None]


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 30])
def test_full_retention_keeps_all_that_was_fed(max_tokens: int, lookahead: int) -> None:
    """The last token is never fed, also where a step in flight has overrun the end."""
    engine = make_engine(lookahead=lookahead)
    engine.add(Request("r", "hello", greedy(max_tokens=max_tokens, n=2, ignore_eos=True)))
    kept = finished(engine)["r"].kv_cache
    tokens = 2 * ROWS * (6 + max_tokens - 1)
    token_bytes = make_workers(10, stages=(4,))[0].page_bytes // 4
    by_layer = (tokens // LAYERS,) * LAYERS
    assert kept == KVUsage(tokens, tokens, tokens * token_bytes, tokens * token_bytes, by_layer)


@pytest.mark.parametrize("lookahead", [1, 2])
def test_a_budget_keeps_its_rows_and_what_was_generated(lookahead: int) -> None:
    engine = make_engine(lookahead=lookahead)
    retention = {"method": "snapkv", "budget": 12, "window": 3}
    sampling = greedy(max_tokens=9, ignore_eos=True)
    engine.add(Request("r", "x" * 40, sampling, retention=retention))
    kept = finished(engine)["r"].kv_cache
    assert kept is not None
    assert (kept.kept_tokens, kept.full_tokens) == (ROWS * (12 + 8), ROWS * (41 + 8))
    assert kept.kept_tokens_by_layer == (ROWS * (12 + 8) // LAYERS,) * LAYERS


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("max_tokens", [2, 9, 16, 25, 40])
def test_a_decode_stage_cuts_what_is_counted(max_tokens: int, lookahead: int) -> None:
    """A row grows from 12 to 12 + slack, and is cut back to 12."""
    engine = make_engine(lookahead=lookahead)
    retention = {"method": "snapkv", "budget": 12, "window": 3, "decode": {"slack_pages": 2}}
    sampling = greedy(max_tokens=max_tokens, ignore_eos=True)
    engine.add(Request("r", "x" * 40, sampling, retention=retention))
    kept = finished(engine)["r"].kv_cache
    assert kept is not None
    slack = 2 * make_workers(10, stages=(4,))[0].page_tokens
    assert kept.kept_tokens == ROWS * (12 + (max_tokens - 1) % slack)


def test_preemptions_change_nothing_of_what_was_kept() -> None:
    found = []
    for num_pages in (1000, 8 * 11):
        engine = make_engine(num_pages, expected_output_tokens=1)
        for i in range(8):
            engine.add(Request(f"r{i}", f"prompt {i}", greedy(max_tokens=20, ignore_eos=True)))
        found.append({name: output.kv_cache for name, output in finished(engine).items()})
    assert engine.report().num_preemptions > 0
    assert found[0] == found[1]


def test_a_request_that_never_ran_kept_nothing() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(max_tokens=3)))
    engine.abort("r")
    assert finished(engine)["r"].kv_cache == KVUsage()
