"""The engine over a replica without a model: requests in, text, scores, times and reports out."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
from support.fake_model import EOS, SPEC, Ascii, continue_text, greedy
from support.fake_replica import (
    PAGE_BYTES,
    FakeReplica,
    RaggedRetention,
    make_workers,
    token_logprob,
)

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.model_fit import known_eos
from saqqara.cluster.engine.report import BatchRows
from saqqara.cluster.engine.streams import AsyncEngine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.live.families import MetricSpec
from saqqara.cluster.request import Request, RequestOutput, ScoreOutput
from saqqara.cluster.sampling import SamplingParams, derived_seed
from saqqara.compression.retention import Retention
from saqqara.compression.scores import SnapKV
from saqqara.configs.schema import EngineConfig

RAGGED = RaggedRetention(method="ragged", score=SnapKV(), budget=12, window=3)
Output = RequestOutput | ScoreOutput


def make_engine(
    num_pages: int = 1000,
    faults: Mapping[tuple[int, int], str] = MappingProxyType({}),
    stages: Sequence[int] = (4,),
    fail_at_step: int = -1,
    lookahead: int = 1,
    step_seconds: float = 0.0,
    tokenizer: Ascii | None = None,
    **settings: Any,
) -> Engine:
    config = EngineConfig.model_validate(
        {"model": "fake", "max_num_seqs": 8, "executor": "ray", "check_integrity": True} | settings
    )
    replica = FakeReplica(
        make_workers(num_pages, stages=stages),
        fail_at_step=fail_at_step,
        step_seconds=step_seconds,
        faults=faults,
    )
    return Engine(config, replica, Tokenizer(tokenizer or Ascii()), SPEC, lookahead=lookahead)


def run(engine: Engine) -> list[Output]:
    outputs: list[Output] = []
    run_into(engine, outputs)
    return outputs


def run_into(engine: Engine, outputs: list[Output]) -> None:
    while engine.has_unfinished():
        outputs += engine.step()


def finished(engine: Engine) -> dict[str, Any]:
    return {o.request_id: o for o in run(engine) if o.finished}


# Generation


def test_a_request_streams_its_text_and_ends() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(max_tokens=6), stream=True))
    outputs = run(engine)
    text, tokens = continue_text("hello", 6)
    assert len(outputs) == 6
    for num, output in enumerate(outputs, start=1):
        assert isinstance(output, RequestOutput)
        assert output.prompt == "hello"
        assert output.prompt_token_ids == (1, *map(ord, "hello"))
        [choice] = output.outputs
        assert choice.token_ids == tuple(tokens[:num])
        assert text.startswith(choice.text)
        assert output.finished == (num == 6)
    assert outputs[-1].outputs[0].text == text  # type: ignore[union-attr]
    assert outputs[-1].outputs[0].finish_reason == "length"  # type: ignore[union-attr]
    metrics = outputs[-1].metrics
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time < metrics.first_token_time < metrics.finished_time


def test_without_stream_only_the_last_output_comes() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(max_tokens=6)))
    [output] = run(engine)
    assert output.finished


def test_prompts_may_be_text_ids_or_messages() -> None:
    engine = make_engine()
    engine.add(Request("text", "hi", greedy(), stream=True))
    engine.add(Request("ids", [1, *map(ord, "hi")], greedy(), stream=True))
    engine.add(Request("chat", messages=[{"role": "user", "content": "hi"}], stream=True))
    outputs = finished(engine)
    assert outputs["text"].outputs == outputs["ids"].outputs
    assert outputs["ids"].prompt is None
    assert outputs["chat"].prompt_token_ids == tuple(map(ord, "user:hi;"))


def test_n_choices_are_one_request_with_seeds_of_their_own() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(n=3, seed=40, max_tokens=2)))
    [output] = run(engine)
    assert isinstance(output, RequestOutput)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    replica = engine._executor
    assert isinstance(replica, FakeReplica)
    seeds = [new.sampling.seed for plan in replica.plans for new in plan.new]
    assert seeds == [derived_seed(40, choice=i) for i in range(3)]
    report = engine.report()
    assert report.requests == {"length": 1}
    assert report.prompt_tokens == 6  # once for all choices
    assert report.generation_tokens == 6


def test_a_default_seed_follows_from_the_engines_and_the_request_id() -> None:
    seeds = []
    for config_seed, request_id in [(0, "a"), (0, "a"), (0, "b"), (1, "a")]:
        engine = make_engine(seed=config_seed)
        engine.add(Request(request_id, "x", SamplingParams(), stream=True))
        run(engine)
        seeds.append(engine._executor.plans[0].new[0].sampling.seed)  # type: ignore[attr-defined]
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_the_text(lookahead: int, include: bool) -> None:
    text, tokens = continue_text("stop here", 12)
    stop = text[4:6]
    end = text.index(stop) + 2
    engine = make_engine(lookahead=lookahead)
    params = greedy(max_tokens=12, stop=stop, include_stop_str_in_output=include)
    engine.add(Request("r", "stop here", params, stream=True))
    [choice] = finished(engine)["r"].outputs
    assert choice.text == text[: end if include else end - 2]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
    assert choice.token_ids == tuple(tokens[: len(choice.token_ids)])
    assert len(choice.token_ids) < 12


def test_a_stop_string_waits_for_min_tokens() -> None:
    text, _ = continue_text("abc", 8)
    engine = make_engine()
    engine.add(Request("r", "abc", greedy(max_tokens=8, min_tokens=7, stop=[text[2]]), stream=True))
    [choice] = finished(engine)["r"].outputs
    assert len(choice.token_ids) >= 8


def test_a_stop_token_is_no_text_unless_asked_for() -> None:
    _, tokens = continue_text("abc", 8)
    stop = next(t for t in tokens if t > 4)
    end = tokens.index(stop)
    for include in (False, True):
        engine = make_engine()
        params = greedy(max_tokens=8, stop_token_ids=[stop], include_stop_str_in_output=include)
        engine.add(Request("r", "abc", params, stream=True))
        [choice] = finished(engine)["r"].outputs
        assert choice.token_ids == tuple(tokens[: end + 1])
        assert choice.stop_reason == stop
        assert choice.text.endswith(chr(stop)) == include


def test_logprobs_come_with_their_tokens() -> None:
    engine = make_engine()
    engine.add(Request("r", "abc", greedy(max_tokens=3, logprobs=2), stream=True))
    [choice] = finished(engine)["r"].outputs
    prompt = [1, *map(ord, "abc")]
    total = 0.0
    for place, token_id in enumerate(choice.token_ids):
        logprob, rank = token_logprob([*prompt, *choice.token_ids[:place]], token_id)
        entry = choice.logprobs[place]
        assert next(iter(entry)) == token_id
        assert (entry[token_id].logprob, entry[token_id].rank) == (logprob, rank)
        assert set(entry) == {token_id, 0, 1}
        assert entry[0].decoded_token == "<0>"
        total += logprob
    assert choice.cumulative_logprob == pytest.approx(total)


def test_tokens_of_the_tokenizer_that_the_model_lacks_name_what_they_came_from() -> None:
    engine = make_engine()
    said = "'é', for which the tokenizer has the token 233; the model's are 0 to 127"
    with pytest.raises(ValueError, match=f"^prompt has {said}"):
        engine.add(Request("r", "caffé", stream=True))
    with pytest.raises(ValueError, match=f"^messages has {said}"):
        engine.add(Request("r", messages=[{"role": "user", "content": "caffé"}], stream=True))
    with pytest.raises(ValueError, match=f"^score_continuation has {said}"):
        engine.add(Request("r", "caff", score_continuation="é"))
    assert not engine.has_unfinished()


def test_end_tokens_that_the_model_lacks_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(Ascii(), eos_token_ids=(EOS, 128, 5))
    assert known_eos(SPEC, tokenizer) == (EOS, 5)
    assert "end tokens 128 are ignored: the model's tokens are 0 to 127" in caplog.text


def test_a_small_pool_changes_nothing_but_the_time() -> None:
    prompts = [f"prompt {i}" for i in range(8)]
    texts = []
    for num_pages in (1000, 8 * 11):
        engine = make_engine(num_pages)
        for prompt in prompts:
            engine.add(Request(prompt, prompt, greedy(max_tokens=20), stream=True))
        outputs = finished(engine)
        texts.append([outputs[p].outputs[0] for p in prompts])
    assert texts[0] == texts[1]
    report = engine.report()
    assert report.num_preemptions > 0
    assert sum(o.metrics.num_preemptions for o in outputs.values()) == report.num_preemptions


# Scores


def test_a_score_has_a_number_per_token() -> None:
    engine = make_engine()
    engine.add(Request("s", "context", score_continuation="answer"))
    [output] = run(engine)
    assert isinstance(output, ScoreOutput)
    tokens = [1, *map(ord, "contextanswer")]
    expected = [token_logprob(tokens[:p], tokens[p]) for p in range(8, 14)]
    assert output.token_ids == tuple(map(ord, "answer"))
    assert output.logprobs == tuple(logprob for logprob, _ in expected)
    assert output.ranks == tuple(rank for _, rank in expected)
    assert output.sum == pytest.approx(sum(output.logprobs))
    assert engine.report().scored_tokens == 6


# What goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either prompt or messages"),
        ({"prompt": "a", "messages": []}, "give either prompt or messages"),
        ({"prompt": []}, "prompt must have at least one token"),
        ({"prompt": [1, 128]}, r"prompt\[1\]=128 is no token of the model; they are 0 to 127"),
        ({"prompt": ["x"]}, r"prompt\[0\] must be a token id, not 'x'"),
        ({"prompt": "a" * 300}, "prompt has 301 tokens; max_model_len=200"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content is missing"),
        ({"prompt": "a", "retention": "snapkw"}, "snapkw"),
        ({"prompt": "a", "retention": "snapkv", "budget": 1}, "budget"),
        ({"prompt": "a", "budget": 64}, "budget"),
    ],
)
def test_a_bad_request_costs_only_itself(arguments: dict[str, Any], message: str) -> None:
    engine = make_engine()
    engine.add(Request("good", "hello", greedy(max_tokens=6), stream=True))
    engine.step()
    with pytest.raises(ValueError, match=message):
        engine.add(Request("bad", **arguments))
    with pytest.raises(ValueError, match="request_id 'good' is in use"):
        engine.add(Request("good", "again"))
    [choice] = finished(engine)["good"].outputs
    assert choice.token_ids == tuple(continue_text("hello", 6)[1])
    engine.add(Request("bad", "is not in use"))


HEADS_OF_ANOTHER = {f"{layer}-{head}": [1] for layer in range(4) for head in range(4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"priority": 2**40}, "priority: must be an integer of at least -2147483648"),
        ({"priority": "high"}, "priority: must be an integer"),
        ({"priority": True}, "priority: must be an integer"),
        ({"priority": float("nan")}, "priority: must be an integer"),
        ({"retention": {"method": "knorm", "skip_layers": [4]}}, "skip_layers: 4 is no layer"),
        (
            {"retention": {"method": "headkv", "profile": HEADS_OF_ANOTHER}},
            "profile: has 4 layers of 4 query heads; this model has 4 of 2",
        ),
        (
            {"retention": {"method": "snapkv", "window": 9000, "decode": True}, "budget": 9999},
            "window: with decode, workers remember the queries of the last 9000 tokens; they have "
            "room for 1000 per sequence",
        ),
    ],
)
def test_what_the_model_or_the_engine_cannot_meet(arguments: dict[str, Any], message: str) -> None:
    """Known before anything is queued; the field of the request is `retention`."""
    engine = make_engine(num_pages=1000)
    about_retention = "retention" in arguments
    in_front = "retention: " if about_retention else ""
    defaults: dict[str, Any] = {"budget": "50%"} if about_retention else {}
    with pytest.raises(ValueError, match=f"^{in_front}{message}"):
        engine.add(Request("bad", "hello", **defaults | arguments))
    assert not engine.has_unfinished()
    engine.add(Request("bad", "is not in use"))


def test_long_prompts_are_truncated_when_asked() -> None:
    engine = make_engine(max_model_len=50)
    engine.add(Request("k", "a" * 100 + "bc", greedy(truncate_prompt_tokens=3), stream=True))
    engine.add(
        Request("fit", "a" * 100, greedy(truncate_prompt_tokens=-1, max_tokens=10), stream=True)
    )
    with pytest.raises(ValueError, match="leaves nothing of the prompt"):
        engine.add(
            Request("none", "a", greedy(truncate_prompt_tokens=-1, max_tokens=50), stream=True)
        )
    outputs = finished(engine)
    assert outputs["k"].prompt_token_ids == tuple(map(ord, "abc"))
    assert len(outputs["fit"].prompt_token_ids) == 40
    assert len(outputs["fit"].outputs[0].token_ids) == 10


def test_a_model_len_past_the_models_context_is_refused() -> None:
    with pytest.raises(ValueError, match="max_model_len=201 is more than the model's context"):
        make_engine(max_model_len=201)


def test_a_sequence_that_outgrows_the_pool_is_an_error_with_its_tokens() -> None:
    engine = make_engine(num_pages=24)
    engine.add(Request("r", "ab", greedy(max_tokens=50), stream=True))
    output = finished(engine)["r"]
    assert output.outputs[0].finish_reason == "error"
    assert len(output.outputs[0].token_ids) == 10
    assert "kv_memory_gib" in output.error


@pytest.mark.parametrize("stages", [(4,), (2, 2)])
@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("step", range(6))
def test_a_fault_ends_its_sequence_alone(
    step: int, lookahead: int, stages: tuple[int, ...]
) -> None:
    """In prefill or decode, with any number of plans of it in flight, on one worker of several."""
    engine = make_engine(stages=stages, lookahead=lookahead, faults={(step, 1): "no number"})
    for name in ("one", "two", "three"):
        engine.add(Request(name, name, greedy(max_tokens=20), stream=True))
    outputs = finished(engine)
    for name in ("one", "three"):
        assert outputs[name].outputs[0].token_ids == tuple(continue_text(name, 20)[1])
    two = outputs["two"]
    assert (two.outputs[0].finish_reason, two.error) == ("error", "no number")
    got = two.outputs[0].token_ids
    assert len(got) < 20
    assert got == tuple(continue_text("two", 20)[1][: len(got)])
    assert engine.report().pages_leaked == 0
    # The engine is as before.
    engine.add(Request("four", "four", greedy(max_tokens=20), stream=True))
    assert finished(engine)["four"].outputs[0].token_ids == tuple(continue_text("four", 20)[1])


def test_a_token_without_text_ends_its_sequence_alone() -> None:
    class Gaps(Ascii):
        def decode(
            self, ids: Sequence[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool
        ) -> str:
            if bad in ids:
                raise KeyError(bad)
            return super().decode(ids, skip_special_tokens, clean_up_tokenization_spaces)

    bad = continue_text("bad", 3)[1][2]
    engine = make_engine(tokenizer=Gaps())
    for name in ("good", "bad"):
        engine.add(Request(name, name, greedy(max_tokens=8), stream=True))
    assert bad not in continue_text("good", 8)[1]
    outputs = finished(engine)
    assert outputs["good"].outputs[0].token_ids == tuple(continue_text("good", 8)[1])
    assert outputs["bad"].outputs[0].finish_reason == "error"
    assert outputs["bad"].error == f"token {bad} cannot be told as text: {bad}"


def test_abort_returns_what_there_is() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(max_tokens=100), stream=True))
    engine.add(Request("s", "a" * 20, score_continuation="b" * 20))
    for _ in range(4):
        engine.step()
    engine.abort(["r", "unknown"])
    engine.abort("s")
    outputs = finished(engine)
    assert outputs["r"].outputs[0].finish_reason == "abort"
    assert outputs["r"].outputs[0].token_ids == tuple(continue_text("hello", 4)[1])
    assert engine.report().pages_leaked == 0


@pytest.mark.parametrize("num_steps", range(8))
def test_what_comes_of_aborted_requests_later_is_ignored(num_steps: int) -> None:
    engine = make_engine(stages=(2, 2), lookahead=2, prefill_quantum=1, max_prefill_tokens=12)
    engine.add(Request("first", "first", greedy(max_tokens=30), stream=True))
    engine.step()
    for name in "abcd":
        engine.add(Request(name, name * 5, greedy(max_tokens=30)))
    for _ in range(num_steps):
        engine.step()
    engine.abort(["a", "b", "c"])
    outputs = finished(engine)
    for name, reason in zip(["first", *"abcd"], ["length", *3 * ["abort"], "length"], strict=True):
        assert outputs[name].outputs[0].finish_reason == reason
    assert engine.report().pages_leaked == 0


def test_restart_goes_on_after_a_worker_died() -> None:
    engine = make_engine(stages=(2, 2), fail_at_step=7)
    for name in ("one", "two", "three"):
        engine.add(Request(name, name, greedy(max_tokens=20), stream=True))
    outputs: list[Output] = []
    with pytest.raises(RuntimeError, match="a worker died") as failure:
        run_into(engine, outputs)
    assert failure.value.__notes__ == ["requests in the step: three"]
    assert engine.report().pages_leaked is None
    with pytest.raises(RuntimeError, match="needs a restart"):
        engine.step()
    engine.restart(FakeReplica(make_workers(500)))
    outputs += run(engine)
    for name in ("one", "two", "three"):
        seen = [o for o in outputs if o.request_id == name and isinstance(o, RequestOutput)]
        # The client's stream goes on where it was.
        assert [len(o.outputs[0].token_ids) for o in seen] == list(range(1, 21))
        assert seen[-1].outputs[0].token_ids == tuple(continue_text(name, 20)[1])


# Measurements


def test_the_report_adds_up() -> None:
    engine = make_engine(
        retention={"method": "pyramidkv", "window": 3, "sinks": 1},
        budget=12,
        max_num_seqs=4,
        prefix_caching=False,
    )
    for i in range(6):
        engine.add(Request(str(i), "a" * 39, greedy(max_tokens=5), stream=True))
    assert engine.report().pages_leaked is None
    run(engine)
    report = engine.report()
    assert report.requests == {"length": 6}
    assert report.num_requests == 6
    assert (report.prompt_tokens, report.generation_tokens) == (240, 30)
    assert report.time_to_first_token.count == 6
    assert report.inter_token_latency.count == 24
    assert report.e2e_latency.count == 6
    assert report.num_running_peak == 4
    assert 0 < report.e2e_latency.p50 <= report.e2e_latency.p99 <= 1.02 * report.wall_seconds
    assert report.generation_tokens_per_second == pytest.approx(30 / report.wall_seconds)
    assert (report.prefill_seconds, report.decode_seconds) == (0.5, 0.5 * report.num_steps)
    layers = engine.retention.layer_tokens(40, 4)
    assert report.kept_tokens_by_layer == tuple(6 * 2 * n for n in layers)
    assert report.dropped_tokens_by_layer == tuple(6 * 2 * (40 - n) for n in layers)
    assert report.pages_leaked == 0
    # Four sequences of two heads with four tokens fed, in pages of four tokens.
    kept = 4 * 2 * sum(-(-(n + 4) // 4) for n in layers)
    assert report.kv_kept_bytes_peak == kept * PAGE_BYTES
    assert report.kv_full_bytes_peak == 4 * 2 * 4 * 11 * PAGE_BYTES
    assert report.workers[0].pages_free == 1000
    assert report.resident_bytes_peak == 11
    assert Retention.parse(engine.retention).label == report.retention
    assert report.model_validate_json(report.model_dump_json()) == report


def test_reset_starts_the_measurements_anew() -> None:
    engine = make_engine()
    engine.add(Request("r", "hello", greedy(max_tokens=6), stream=True))
    run(engine)
    engine.reset_stats()
    report = engine.report()
    assert (report.num_requests, report.generation_tokens, report.wall_seconds) == (0, 0, 0.0)
    assert report.kv_kept_bytes_peak == 0
    assert report.time_to_first_token.count == 0


def test_metrics_follow_the_engine() -> None:
    engine = make_engine(retention="snapkv", budget=40)
    engine.add(Request("a", "hello", greedy(max_tokens=6), stream=True))
    engine.add(Request("b", "a" * 59, greedy(max_tokens=6), stream=True))
    run(engine)
    text = engine.metrics.render()
    for line in [
        'vllm:generation_tokens_total{model_name="fake"} 12.0',
        'vllm:prompt_tokens_total{model_name="fake"} 66.0',
        'vllm:request_success_total{finished_reason="length",model_name="fake"} 2.0',
        'vllm:inter_token_latency_seconds_count{model_name="fake"} 10.0',
        'vllm:num_requests_running{model_name="fake"} 0.0',
        'vllm:kv_cache_usage_perc{model_name="fake"} 0.0',
        'saqqara:kept_tokens_total{layer="3",method="snapkv",model_name="fake"} 92.0',
        'saqqara:dropped_tokens_total{layer="3",method="snapkv",model_name="fake"} 40.0',
        'saqqara:worker_memory_bytes{kind="weight",model_name="fake",worker="0"} 7.0',
        'saqqara:num_pages{model_name="fake",worker="0"} 1000.0',
        'saqqara:pages_free{model_name="fake",worker="0"} 1000.0',
        'saqqara:pages_leaked{model_name="fake"} 0.0',
        'saqqara:num_refusals_total{model_name="fake"} 0.0',
        'saqqara:batch_rows{model_name="fake"} 0.0',
        'saqqara:batch_rows_done_total{model_name="fake",outcome="answered"} 0.0',
    ]:
        assert line in text
    # What a conversation keeps fills pages, but whoever needs them gets them.
    engine.add(Request("c", "a" * 59, greedy(max_tokens=6), conversation_id="talk"))
    run(engine)
    state = engine.live_stats().kv_cache
    assert (state.usage, state.pages_free < 1000) == (0.0, True)
    text = engine.metrics.render()
    assert 'vllm:kv_cache_usage_perc{model_name="fake"} 0.0' in text
    assert 'saqqara:conversations{model_name="fake"} 1.0' in text


def test_metrics_count_refusals_and_rows() -> None:
    config = EngineConfig(model="fake", executor="ray", max_num_seqs=2)
    # Ragged heads can ask more of one rank than was expected.
    replica = FakeReplica(make_workers(36, head_ranges=((0, 1), (1, 2))))
    engine = Engine(config, replica, Tokenizer(Ascii()), SPEC)
    for name in "abcdef":
        engine.add(Request(name, name * 29, greedy(max_tokens=2), retention=RAGGED, stream=True))
    run(engine)
    engine.note_rows(BatchRows(num_rows=9, num_left=6, num_answered=2, num_errors=1))
    engine.note_rows(BatchRows(num_rows=9, num_left=4, num_answered=2, num_errors=0))
    text = engine.metrics.render()
    [refused] = re.findall(r"^saqqara:num_refusals_total{[^}]*} (\d+)", text, re.M)
    [preempted] = re.findall(r"^vllm:num_preemptions_total{[^}]*} (\d+)", text, re.M)
    assert 0 < int(refused) <= int(preempted)
    for line in [
        'saqqara:pages_leaked{model_name="fake"} 0.0',
        'saqqara:batch_rows{model_name="fake"} 9.0',
        'saqqara:batch_rows_left{model_name="fake"} 4.0',
        'saqqara:batch_rows_done_total{model_name="fake",outcome="answered"} 4.0',
        'saqqara:batch_rows_done_total{model_name="fake",outcome="error"} 1.0',
    ]:
        assert line in text


def test_other_sinks_get_the_same_numbers() -> None:
    total: dict[str, float] = {}

    def inc(spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        total[spec.name] = total.get(spec.name, 0) + value

    def ignore(spec: MetricSpec, value: float, labels: tuple[str, ...]) -> None:
        pass

    sink = SimpleNamespace(inc=inc, set=ignore, observe=ignore)
    config = EngineConfig.model_validate({"model": "fake"})
    replica = FakeReplica(make_workers(100))
    engine = Engine(config, replica, Tokenizer(Ascii()), SPEC, sinks=[sink])
    engine.add(Request("a", "hello", greedy(max_tokens=6), stream=True))
    run(engine)
    assert total["vllm:generation_tokens"] == 6


@pytest.mark.parametrize("check_integrity", [False, True])
def test_integrity_is_checked_when_asked(check_integrity: bool) -> None:
    engine = make_engine(check_integrity=check_integrity)
    engine.add(Request("r", "hello", greedy(max_tokens=3), stream=True))
    run(engine)
    replica = engine._executor
    assert isinstance(replica, FakeReplica)
    assert replica.num_integrity_checks == (len(replica.plans) if check_integrity else 0)
    engine.shutdown()
    assert replica.is_shut_down


# Async


@pytest.fixture
def async_engine() -> Any:
    engine = AsyncEngine(make_engine())
    yield engine
    engine.shutdown()


async def collect(engine: AsyncEngine, name: str, **params: Any) -> list[RequestOutput]:
    return [
        output
        async for output in engine.generate(Request(name, name, greedy(**params), stream=True))
    ]


def test_gauges_are_there_before_the_first_step() -> None:
    text = make_engine().metrics.render()
    assert 'saqqara:pages_free{model_name="fake",worker="0"}' in text


async def test_many_streams_at_once(async_engine: AsyncEngine) -> None:
    names = [f"name {i}" for i in range(20)]
    streams = await asyncio.gather(*(collect(async_engine, n, max_tokens=5) for n in names))
    for name, outputs in zip(names, streams, strict=True):
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        assert counts == sorted(set(counts)), "every output has something new"
        assert outputs[-1].outputs[0].token_ids == tuple(continue_text(name, 5)[1])
    assert (await async_engine.report()).requests == {"length": 20}


async def test_a_slow_reader_gets_the_latest_output_only(async_engine: AsyncEngine) -> None:
    stream = async_engine.generate(Request("slow", "hello", greedy(max_tokens=50), stream=True))
    await anext(stream)
    while not (await async_engine.report()).requests:
        await asyncio.sleep(0.01)
    rest = [output async for output in stream]
    assert [output.finished for output in rest] == [True], "the 49 tokens since came as one"
    assert len(rest[0].outputs[0].token_ids) == 50


async def test_leaving_a_stream_aborts_its_request(async_engine: AsyncEngine) -> None:
    stream = async_engine.generate(Request("r", "hello", greedy(max_tokens=190), stream=True))
    async for output in stream:
        if len(output.outputs[0].token_ids) >= 2:
            break
    await stream.aclose()
    while not (report := await async_engine.report()).requests:
        await asyncio.sleep(0.01)
    assert report.requests == {"abort": 1}
    assert report.generation_tokens < 190


async def test_cancelling_aborts_too() -> None:
    engine = AsyncEngine(make_engine(step_seconds=0.01))
    task = asyncio.create_task(collect(engine, "r", max_tokens=190))
    while (await engine.report()).num_steps == 0:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    outputs = await collect(engine, "s", max_tokens=3)
    assert len(outputs[-1].outputs[0].token_ids) == 3
    assert (await engine.report()).requests == {"abort": 1, "length": 1}
    await asyncio.to_thread(engine.shutdown)


async def test_a_bad_request_raises_for_itself_only(async_engine: AsyncEngine) -> None:
    good = asyncio.create_task(collect(async_engine, "good", max_tokens=30))
    with pytest.raises(ValueError, match="prompt has 300 tokens"):
        async for _ in async_engine.generate(Request("bad", [1] * 300, stream=True)):
            pass
    assert len((await good)[-1].outputs[0].token_ids) == 30


async def test_a_failure_reaches_every_waiter() -> None:
    engine = AsyncEngine(make_engine(fail_at_step=4))
    results = await asyncio.gather(
        collect(engine, "a", max_tokens=50),
        collect(engine, "b", max_tokens=50),
        return_exceptions=True,
    )
    for result in results:
        assert isinstance(result, EngineDeadError)
        assert "a worker died" in str(result)
        assert isinstance(result.__cause__, RuntimeError)
    with pytest.raises(EngineDeadError, match="a worker died"):
        await collect(engine, "c")
    engine.shutdown()


async def test_shutdown_ends_those_who_wait() -> None:
    engine = AsyncEngine(make_engine(step_seconds=0.02))
    task = asyncio.create_task(collect(engine, "a", max_tokens=190))
    await asyncio.sleep(0.01)
    await asyncio.to_thread(engine.shutdown)
    with pytest.raises(EngineDeadError, match="shut down"):
        await task
    engine.shutdown()
    with pytest.raises(EngineDeadError, match="shut down"):
        await collect(engine, "b")
