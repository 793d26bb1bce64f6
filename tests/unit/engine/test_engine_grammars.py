"""Requests wait for their grammar beside the steps of the others, and go on where they were."""

import json
import os
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from support.byte_llama import save_tiny_llama
from support.fake_clock import FakeClock
from support.fake_model import SPEC, Ascii
from support.fake_replica import FakeReplica, make_workers

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import LocalExecutor
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.errors import WorkerDiedError
from saqqara.cluster.request import Request, RequestOutput
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.structured.preparation import MAX_SECONDS
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import load_spec
from saqqara.workers.plan import Grammar

FORM = {"regex": "[ab]+"}


class SlowReplica(FakeReplica):
    """Compiles when it is told to."""

    def __init__(self) -> None:
        super().__init__(make_workers(1000))
        self.compiling: list[tuple[Grammar, Future[None]]] = []

    def compile_grammar(self, grammar: Grammar) -> Future[None]:
        self.compiling.append((grammar, Future()))
        return self.compiling[-1][1]


class Bed:
    """An engine whose workers compile when they are told to."""

    def __init__(self) -> None:
        self.clock, self.replica = FakeClock(), SlowReplica()
        config = EngineConfig.model_validate(
            {"model": "fake", "max_num_seqs": 8, "executor": "ray", "check_integrity": True}
        )
        tokenizer = Tokenizer(Ascii())
        self.engine = Engine(config, self.replica, tokenizer, SPEC, clock=self.clock)
        self.outputs: dict[str, RequestOutput] = {}

    def add(self, name: str, form: dict[str, Any] | None = None, **sampling: Any) -> None:
        params = SamplingParams(temperature=0, max_tokens=4, structured_outputs=form, **sampling)
        self.engine.add(Request(name, "hi", params))

    def step(self, count: int = 10) -> None:
        for _ in range(count):
            for output in self.engine.step():
                assert isinstance(output, RequestOutput)
                self.outputs[output.request_id] = output

    def compiled(self, place: int = 0, error: Exception | None = None) -> None:
        future = self.replica.compiling[place][1]
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def is_done(self) -> bool:
        return not self.engine.has_unfinished() and self.engine.report().pages_leaked == 0


def test_a_request_waits_for_its_grammar_and_nobody_else_does() -> None:
    bed = Bed()
    bed.add("held", FORM, n=2)
    bed.add("free")
    bed.step()
    assert list(bed.outputs) == ["free"]
    assert bed.engine.scheduler.num_waiting == 2
    bed.compiled()
    bed.step()
    assert [c.finish_reason for c in bed.outputs["held"].outputs] == ["length"] * 2
    assert bed.is_done()


def test_a_grammar_is_compiled_once() -> None:
    bed = Bed()
    for name in ("one", "two"):
        bed.add(name, FORM)
    bed.step(1)
    bed.compiled()
    bed.step()
    bed.add("three", FORM)
    bed.add("other", {"regex": "c"})
    bed.step()
    assert sorted(bed.outputs) == ["one", "three", "two"]
    assert len(bed.replica.compiling) == 2
    bed.compiled(1)
    bed.step()
    assert bed.is_done()


def test_a_grammar_that_cannot_be_compiled_ends_its_requests_alone() -> None:
    bed = Bed()
    for name, form in (("one", FORM), ("two", FORM), ("free", None)):
        bed.add(name, form)
    bed.step(1)
    bed.compiled(error=ValueError("it is too large"))
    bed.step()
    for name in ("one", "two"):
        assert bed.outputs[name].error == "structured_outputs: it is too large"
        assert bed.outputs[name].error_code == "constraint_failed"
    assert bed.outputs["free"].outputs[0].finish_reason == "length"
    assert bed.is_done()


def test_a_request_may_end_while_its_grammar_is_compiled() -> None:
    bed = Bed()
    for name in ("one", "two"):
        bed.add(name, FORM)
    bed.step(2)
    bed.engine.abort("one")
    bed.step(2)
    assert bed.outputs["one"].outputs[0].finish_reason == "abort"
    bed.compiled()
    bed.step()
    assert bed.outputs["two"].outputs[0].finish_reason == "length"
    assert bed.is_done()


def test_a_grammar_that_takes_too_long_is_given_up() -> None:
    bed = Bed()
    bed.add("held", FORM)
    bed.step(2)
    bed.clock.time += MAX_SECONDS
    bed.step(2)
    assert re.match(
        "structured_outputs: it is not compiled after 60", str(bed.outputs["held"].error)
    )
    assert bed.is_done()


def test_new_workers_compile_again_what_the_lost_ones_had() -> None:
    bed = Bed()
    bed.add("before", FORM)
    bed.step(1)
    bed.compiled()
    bed.step()
    bed.add("ready", FORM)
    bed.add("held", {"regex": "c"})
    bed.step(1)
    bed.compiled(1, WorkerDiedError("a rank died"))
    next_replica = bed.replica = SlowReplica()
    bed.engine.restart(next_replica)
    bed.step()
    assert bed.outputs["ready"].outputs[0].finish_reason == "length"
    assert [grammar.text for grammar, _ in next_replica.compiling] == [
        SamplingParams(structured_outputs={"regex": "c"}).structured_outputs.text  # type: ignore[union-attr]
    ]
    bed.add("after", FORM)
    bed.step(1)
    assert len(next_replica.compiling) == 2
    for place in (0, 1):
        bed.compiled(place)
    bed.step()
    assert sorted(bed.outputs) == ["after", "before", "held", "ready"]
    assert bed.is_done()


def test_a_grammar_that_ends_the_workers_twice_is_given_up() -> None:
    bed = Bed()
    bed.add("held", FORM)
    for _ in range(2):
        bed.step(1)
        bed.compiled(error=WorkerDiedError("a rank died"))
        bed.replica = SlowReplica()
        bed.engine.restart(bed.replica)
    bed.step(2)
    assert "workers were lost 2 times while they compiled it" in str(bed.outputs["held"].error)
    assert bed.is_done()


FORMS: dict[str, dict[str, Any]] = {
    "one": {"regex": "([a-c]{4}-)+"},
    "two": {"json": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 30}},
    "three": {"grammar": 'start: "<" start ">" | "x" start | "x"'},
    "completed": {"json": {"type": "string"}},
    "free": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes."""
    path = tmp_path_factory.mktemp("bytes")
    save_tiny_llama(path)
    return path


def answers(
    folder: Path,
    *,
    restart_at: int = -1,
    lookahead: int = 1,
    max_tokens: int = 60,
    **settings: Any,
) -> Any:
    """The texts of `FORMS`' answers, and how often one of them was preempted."""
    given = {"model": str(folder), "dtype": "float32", "load_format": "dummy", "page_tokens": 4}
    config = EngineConfig.model_validate(
        given | {"check_integrity": True, "max_num_seqs": 4, "kv_memory_gib": 0.01} | settings
    )
    tokenizer, spec = Tokenizer.load(folder), load_spec(str(folder))
    executor = LocalExecutor(config, in_thread=lookahead > 1)
    engine = Engine(config, executor, tokenizer, spec, lookahead=lookahead)
    for name, form in FORMS.items():
        params = SamplingParams(
            max_tokens=max_tokens,
            seed=3,
            ignore_eos=name != "completed",
            structured_outputs=form or None,
        )
        engine.add(Request(name, "hello " * 4, params))
    found: dict[str, str] = {}
    step = 0
    while engine.has_unfinished():
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            assert output.error is None, output.error
            found[output.request_id] = output.outputs[0].text
        step += 1
        if step == restart_at:
            engine.restart(LocalExecutor(config))
    num_preempted = engine.report().num_preemptions
    engine.shutdown()
    return found, num_preempted


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, str]:
    """The texts of a run in which nothing happens."""
    texts, num_preempted = answers(folder)
    assert num_preempted == 0
    assert re.fullmatch("([a-c]{4}-){12}", texts["one"])
    assert texts["two"].startswith("[")
    assert set(texts["three"]) <= {"<", "x", ">"}
    assert json.loads(texts["completed"])
    return dict(texts)


def test_preempted_answers_go_on_where_they_were(folder: Path, undisturbed: Any) -> None:
    texts, num_preempted = answers(folder, kv_memory_gib=0.0002)
    assert num_preempted > 0
    assert texts == undisturbed


def test_answers_go_on_with_other_workers(folder: Path, undisturbed: Any) -> None:
    texts, _ = answers(folder, restart_at=60)
    assert texts == undisturbed


def test_two_steps_may_be_in_flight(folder: Path, undisturbed: Any) -> None:
    texts, _ = answers(folder, lookahead=2)
    assert texts == undisturbed


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter")
def test_answers_that_the_device_samples_are_the_same(folder: Path) -> None:
    expected, _ = answers(folder, max_tokens=8)
    assert json.loads(expected["completed"])
    assert answers(folder, max_tokens=8, lookahead=2, attention_backend="triton")[0] == expected
