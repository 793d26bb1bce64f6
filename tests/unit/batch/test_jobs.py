"""A batch job: every line of the input gets exactly one record, whatever happens.

The engine is a fake here, so that bad lines, kills and resumes can be tested by the hundred; the
real engine under a batch job is in tests/ray.
"""

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_client import FakeClient

from saqqara.cluster.batch.job import BatchJob, run_batch
from saqqara.cluster.batch.lines import BadLine, Row, RowParser
from saqqara.cluster.batch.records import result_record
from saqqara.cluster.batch.source import BatchSource
from saqqara.cluster.batch.stop import Stopped
from saqqara.cluster.batch.summary import BatchSummary
from saqqara.cluster.errors import EngineDeadError
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig

Records = list[dict[str, Any]]


def make_job(folder: Path, lines: list[Any], **settings: Any) -> BatchJob:
    """A job over these lines (objects become JSON) in `folder`."""
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (folder / "in.jsonl").write_text(text, encoding="utf-8")
    settings = {
        "config": EngineConfig(model="models/fake", max_num_seqs=2),
        "sampling": SamplingParams(max_tokens=4),
    } | settings
    return BatchJob(input=folder / "in.jsonl", output=folder / "out.jsonl", **settings)


def records(job: BatchJob) -> Records:
    """The output by input line; fails if a line has two records or one is torn."""
    text = job.output.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    found: Records = [json.loads(line) for line in text.splitlines()]
    assert len({record["line"] for record in found}) == len(found)
    return sorted(found, key=lambda record: int(record["line"]))


def run(job: BatchJob, **client: Any) -> Records:
    """Run a job to its end with a fake engine."""
    summary = run_batch(job, FakeClient(**client))
    assert summary.complete
    return records(job)


def parse(line: Any, **sampling: Any) -> Row:
    """One line that must be a request."""
    text = line if isinstance(line, str) else json.dumps(line)
    row = RowParser("models/fake", sampling).parse(1, text)
    assert isinstance(row, Row), row
    return row


def test_every_line_has_one_record_and_keeps_its_id(tmp_path: Path) -> None:
    lines = [
        {"prompt": "hello", "custom_id": "a"},
        "",
        {"messages": [{"role": "user", "content": "chat"}]},
        {"prompt": [1, 2, 3], "max_tokens": 2, "custom_id": "c"},
    ]
    first, chat, third = run(make_job(tmp_path, lines))
    assert first == {
        "line": 1,
        "custom_id": "a",
        "text": "olle",
        "finish_reason": "length",
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 4,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "error": None,
    }
    assert (chat["line"], chat["custom_id"], chat["text"]) == (3, None, "tahc")
    assert (third["line"], third["usage"]["completion_tokens"]) == (4, 2)


def test_openai_lines_get_openai_records(tmp_path: Path) -> None:
    chat = {"model": "fake", "messages": [{"role": "user", "content": "hey"}], "logprobs": True}
    lines = [
        {"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": chat},
        {
            "custom_id": "y",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "models/fake", "prompt": "abc", "max_tokens": 2, "logprobs": 1},
        },
        {"custom_id": "z", "method": "POST", "url": "/v1/embeddings", "body": {}},
    ]
    x, y, z = run(make_job(tmp_path, lines, return_token_ids=True))
    assert x["id"] == "batch_req_1"
    assert (x["custom_id"], x["line"], x["error"]) == ("x", 1, None)
    assert x["response"]["status_code"] == 200
    body = x["response"]["body"]
    assert body["object"] == "chat.completion"
    message = {"role": "assistant", "content": "yeh", "refusal": None}
    assert body["choices"][0]["message"] == message
    assert body["choices"][0]["token_ids"] == [ord(c) for c in "yeh"]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 3,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["y", "e", "h"]
    body = y["response"]["body"]
    assert (body["object"], body["choices"][0]["text"]) == ("text_completion", "cb")
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert z["response"] is None
    assert z["error"]["param"] == "url"
    assert "/v1/chat/completions" in z["error"]["message"]


WRAPPED = {"custom_id": "a", "method": "POST", "url": "/v1/completions"}
CHAT = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    ("line", "field", "hint"),
    [
        ("{", None, "not JSON"),
        ("[1]", None, "JSON object"),
        ('{"prompt": NaN}', "prompt", "finite numbers alone, not NaN"),
        ('{"prompt": "x", "logit_bias": {"7": -1e999}}', "logit_bias.7", "not -Infinity"),
        ('{"prompt": "\\ud800"}', None, "surrogate"),
        ("[" * 100_000, None, "not JSON"),
        ('{"prompt": "x", "prompt": "y"}', "prompt", "'prompt' is there twice"),
        ('{"prompt": "x", "stop": "a", "\\u0073top": null}', "stop", "'stop' is there twice"),
        ('{"prompt": "x", "logit_bias": {"7": 1, "7": 2}}', "7", "'7' is there twice"),
        ('{"messages": [{"role": "user", "role": "system"}]}', "role", "'role' is there twice"),
        ({}, "prompt", "exactly one of"),
        ({"prompt": None}, "prompt", "prompt is null, so the line has no prompt"),
        ({"messages": None, "prompt": None}, "prompt", "prompt and messages are null"),
        ({"prompt": "x", "messages": HELLO}, "prompt", "exactly one of"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": 5}, "prompt", "prompt must be a string or a list of token ids, not a number"),
        ({"prompt": [1, "2"]}, "prompt", "list of token ids"),
        ({"prompt_token_ids": []}, "prompt_token_ids", "list of token ids"),
        ({"prompt": "x", "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "x", "temperature": "0.5"}, "temperature", "number"),
        ({"prompt": "x", "max_tokens": True}, "max_tokens", "integer"),
        ({"prompt": "x", "max_tokens": 2, "min_tokens": 3}, "min_tokens", "at most max_tokens"),
        ({"prompt": "x", "retention": 3}, "retention", "name of a method or a mapping"),
        ({"prompt": "x", "retention": ""}, "retention", "unknown ''"),
        (
            {"prompt": "x", "retention": {"method": "headkv", "budget": 5, "profile": __file__}},
            "retention",
            "profile must be one of",
        ),
        (
            {**WRAPPED, "body": {"prompt": "x", "retention": {"profile": "/etc/passwd"}}},
            "retention",
            "profile must be one of",
        ),
        ({"prompt": "x", "budget": 0.5}, "budget", "25%"),
        ({"prompt": "x", "custom_id": 7}, "custom_id", "custom_id is a number; it must be"),
        ({"prompt": "x", "custom_id": {}}, "custom_id", "custom_id is an object; it must be"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
        ({"method": "POST"}, "custom_id", "string"),
        (WRAPPED, "body", "missing"),
        ({**WRAPPED, "body": {}, "extra": 1}, "extra", "unknown key"),
        ({**WRAPPED, "method": "GET", "body": {}}, "method", "POST"),
        ({**WRAPPED, "body": {"prompt": "x", "suffix": "y"}}, "suffix", "not supported"),
        ({**WRAPPED, "body": {"prompt": "x", "stream": True}}, "stream", "false"),
        ({"prompt": "x", "conversation_id": "a"}, "conversation_id", "order"),
        ({**WRAPPED, "body": {"prompt": "x", "model": "gpt"}}, "model", "models/fake"),
        ({**WRAPPED, "body": {"messages": HELLO}}, "prompt", "required"),
        ({**CHAT, "body": {"messages": HELLO, "top_logprobs": 2}}, "top_logprobs", "logprobs"),
        ({**CHAT, "body": {"messages": HELLO, "logprobs": 2}}, "logprobs", "boolean"),
    ],
)
def test_a_bad_line_says_what_is_wrong(line: Any, field: str | None, hint: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    bad = RowParser("models/fake", {}).parse(1, text)
    assert isinstance(bad, BadLine)
    assert bad.field == field
    assert hint in bad.message
    assert "\n" not in bad.message


def test_bad_lines_cost_only_themselves(tmp_path: Path) -> None:
    lines = [
        {"prompt": "one"},
        "{broken",
        {"prompt": "long" * 100, "custom_id": "too long"},
        {"prompt": "crash"},
        {"prompt": "two", "temperature": 9e5},
        {"prompt": "three", "top_p": 2.0},
    ]
    done = run(make_job(tmp_path, lines), max_prompt_tokens=100, fail=["crash"])
    assert [record["line"] for record in done] == [1, 2, 3, 4, 5, 6]
    assert [record["error"] is None for record in done] == [True, False, False, False, True, False]
    assert done[2]["custom_id"] == "too long"
    assert done[2]["error"]["param"] == "prompt"
    assert "at most 100" in done[2]["error"]["message"]
    assert "pages do not fit" in done[3]["error"]["message"]


def test_bytes_that_are_no_text_and_a_byte_order_mark(tmp_path: Path) -> None:
    job = make_job(tmp_path, [])
    job.input.write_bytes(b'\xef\xbb\xbf{"prompt": "bom"}\r\n\xff\xfe\n{"prompt": "last"}')
    done = run(job)
    assert [record["text"] for record in done] == ["mob", None, "tsal"]
    assert "UTF-8" in done[1]["error"]["message"]


def test_of_two_lines_with_one_id_the_first_counts(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": c, "custom_id": "same"} for c in "ab"])
    first, second = run(job)
    assert first["text"] == "a"
    assert second["error"]["param"] == "custom_id"
    assert "line 1" in second["error"]["message"]


def test_settings_of_a_line_go_before_the_jobs() -> None:
    row = parse({"prompt": "x", "temperature": 0.5, "stop": "end"}, temperature=0.0, max_tokens=9)
    params = row.requests[0].sampling_params
    assert (params.temperature, params.max_tokens, params.stop) == (0.5, 9, ("end",))
    row = parse({"prompt": "x", "retention": {"method": "snapkv"}, "budget": "25%"})
    assert row.requests[0].retention == Retention.parse("snapkv", "25%")
    body = {"messages": HELLO, "max_completion_tokens": 5, "logprobs": True, "top_logprobs": 2}
    params = parse({**CHAT, "body": {**body, "seed": None}}).requests[0].sampling_params
    assert (params.max_tokens, params.logprobs, params.seed) == (5, 2, None)


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = parse({"messages": [{"role": "user", "content": parts}]})
    assert row.requests[0].messages == ({"role": "user", "content": "a\nb"},)


def test_rows_in_flight_are_bounded(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": str(i)} for i in range(50)])
    client = FakeClient()
    run_batch(job, client)
    assert client.max_waiting == 4  # twice max_num_seqs
    client = FakeClient()
    run_batch(make_job(tmp_path, [{"prompt": "x"}] * 50, max_in_flight=7, overwrite=True), client)
    assert client.max_waiting == 7
    assert not client.closed  # whoever brings a client also ends it


def test_several_choices_and_token_ids(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": "ab", "n": 2, "logprobs": 0}], return_token_ids=True)
    (record,) = run(job)
    assert record["token_ids"] == [98, 97]
    assert [choice["text"] for choice in record["choices"]] == ["ba", "ba"]
    assert record["usage"]["completion_tokens"] == 4
    assert [entry["token_id"] for entry in record["logprobs"]] == [98, 97]


def test_the_metrics_hear_how_far_a_job_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saqqara.cluster.batch.progress.NOTE_SECONDS", 0.0)
    rows = [*({"prompt": f"row {i}"} for i in range(9)), "bad", "worse"]
    with pytest.raises(EngineDeadError):
        run_batch(make_job(tmp_path, rows), FakeClient(die_after=4, per_poll=2))
    client = FakeClient(per_poll=2)
    summary = run_batch(make_job(tmp_path, rows), client)
    first, last = client.noted[0], client.noted[-1]
    assert (first.num_rows, first.num_left) == (11, 11 - summary.resumed)
    assert (first.num_answered, first.num_errors) == (0, 0)
    assert last.num_left == 0
    assert sum(note.num_answered for note in client.noted) == summary.answered > 0
    assert sum(note.num_errors for note in client.noted) == summary.errors
    left = [note.num_left for note in client.noted]
    assert left == sorted(left, reverse=True)
    assert len(set(left)) > 2


def test_openai_lines_may_name_the_model_as_it_is_served(tmp_path: Path) -> None:
    bodies = [{"prompt": "ab", "model": name} for name in ("gpt-4o", "ours", "models/fake")]
    lines = [{**WRAPPED, "custom_id": str(i), "body": body} for i, body in enumerate(bodies)]
    gpt, ours, path = run(make_job(tmp_path, lines, served_model_name="ours"))
    assert gpt["error"]["param"] == "model"
    assert "'ours'" in gpt["error"]["message"]
    assert [record["error"] for record in (ours, path)] == [None, None]
    assert ours["response"]["body"]["model"] == "ours"
    anyone = run(make_job(tmp_path, lines, ignore_model=True, overwrite=True))
    assert [record["error"] for record in anyone] == [None] * 3
    assert anyone[0]["response"]["body"]["model"] == "models/fake"


def test_an_answer_that_is_no_json_costs_only_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(row: Row, *args: Any) -> dict[str, Any]:
        record = result_record(row, *args)
        if row.line == 2:
            record["logprobs"] = math.nan
        elif row.line == 3:
            raise ZeroDivisionError("oh")
        return record

    monkeypatch.setattr("saqqara.cluster.batch.answers.result_record", broken)
    one, two, three, four = run(make_job(tmp_path, [{"prompt": c} for c in "abcd"]))
    assert (one["error"], four["error"]) == (None, None)
    assert "the answer cannot be written: ValueError" in two["error"]["message"]
    assert "ZeroDivisionError: oh" in three["error"]["message"]


def test_a_line_that_the_parser_breaks_on_costs_only_itself(tmp_path: Path) -> None:
    class Breaking(RowParser):
        def parse(self, line: int, text: str) -> Row | BadLine:
            if line == 2:
                raise ZeroDivisionError("oh")
            return super().parse(line, text)

    job = make_job(tmp_path, [{"prompt": c} for c in "abc"])
    with BatchSource(job.input) as source:
        source.scan(tmp_path)
        rows = list(source.rows(Breaking("models/fake", {})))
    assert [isinstance(row, Row) for row in rows] == [True, False, True]


# Resuming -----------------------------------------------------------------------------------------


@given(answered=st.integers(0, 30), torn=st.integers(0, 200))
def test_a_job_that_died_goes_on_where_it_stopped(
    tmp_path_factory: pytest.TempPathFactory, answered: int, torn: int
) -> None:
    job = make_job(tmp_path_factory.mktemp("job"), [{"prompt": f"row {i}"} for i in range(20)])
    if answered < 20:
        with pytest.raises(EngineDeadError, match="rank 1 died"):
            run_batch(job, FakeClient(die_after=answered, per_poll=1))
    else:
        run_batch(job, FakeClient())
    # A kill may tear the last line anywhere.
    with job.output.open("r+b") as file:
        file.truncate(max(job.output.stat().st_size - torn, 0))
    kept = job.output.read_bytes().count(b"\n")
    client = FakeClient()
    summary = run_batch(job, client)
    assert summary.complete
    assert summary.resumed == kept
    assert len(client.submitted) == 20 - kept
    assert [record["line"] for record in records(job)] == list(range(1, 21))


def test_a_finished_job_does_nothing_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}, "bad"])
    run(job)
    before = job.output.read_bytes()
    client = FakeClient()
    summary = run_batch(job, client)
    assert summary.complete
    assert (summary.resumed, summary.answered, summary.report) == (2, 0, None)
    assert client.submitted == []
    assert job.output.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sampling": SamplingParams(max_tokens=5)}, "sampling.max_tokens was 4 and is now 5"),
        ({"config": EngineConfig(model="other")}, "model was 'models/fake' and is now 'other'"),
        (
            {"config": EngineConfig(model="models/fake", retention="snapkv", budget=64)},
            "retention",
        ),
        ({"return_token_ids": True}, "return_token_ids"),
    ],
)
def test_results_of_other_settings_are_not_mixed(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    lines = [{"prompt": "x"}]
    run(make_job(tmp_path, lines))
    changed = make_job(tmp_path, lines, **change)
    with pytest.raises(ValueError, match="--overwrite") as error:
        run_batch(changed, FakeClient())
    assert named in str(error.value)
    assert run(make_job(tmp_path, lines, **change, overwrite=True))[0]["error"] is None


def test_settings_that_change_no_answer_may_change(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}])
    run(job)
    other = EngineConfig(model="models/fake", max_num_seqs=9, page_tokens=8, executor="ray")
    assert run_batch(make_job(tmp_path, [{"prompt": "x"}], config=other), FakeClient()).complete


def test_a_never_mixed_is_not_resumed(tmp_path: Path) -> None:
    run(make_job(tmp_path, [{"prompt": "x"}]))
    with pytest.raises(ValueError, match="the input file has changed"):
        run_batch(make_job(tmp_path, [{"prompt": "y"}]), FakeClient())


def test_files_that_are_not_a_jobs_are_left_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}])
    job.output.write_text("precious\n")
    with pytest.raises(ValueError, match="not a batch job's"):
        run_batch(job, FakeClient())
    assert job.output.read_text() == "precious\n"
    same = BatchJob(job.input, job.input, job.config, job.sampling)
    with pytest.raises(ValueError, match="is the input"):
        run_batch(same, FakeClient())
    with pytest.raises(ValueError, match="cannot read"):
        run_batch(BatchJob(tmp_path / "no.jsonl", job.output, job.config, job.sampling))


@pytest.mark.parametrize("damage", [b"\0\0\0", b"[" * 100_000, b'{"line": 1}'])
def test_a_damaged_output_is_an_error(tmp_path: Path, damage: bytes) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}, {"prompt": "y"}])
    run(job)
    job.output.write_bytes(damage + b"\n" + job.output.read_bytes())
    with pytest.raises(ValueError, match=r"line 1 of .* is no batch result"):
        run_batch(job, FakeClient())


@pytest.mark.parametrize("retry_errors", [False, True])
@pytest.mark.parametrize(
    ("added", "said"),
    [
        (1, "line 3 of .*out.* is a second record of line 1 of the input; remove one of the two"),
        (2, "line 3 of .*out.* is a second record of line 2 of the input; remove one of the two"),
        (3, "line 3 of .*out.* is a record of line 3 of the input, which has 2; remove it"),
        (0, "line 3 of .*out.* is a record of line 0 of the input, which has 2; remove it"),
        ("1", "line 3 of .*out.* is no batch result"),
        (1.5, "line 3 of .*out.* is no batch result"),
        (True, "line 3 of .*out.* is no batch result"),
    ],
)
def test_an_output_with_more_than_one_record_a_row_is_an_error(
    tmp_path: Path, added: Any, said: str, retry_errors: bool
) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}, "bad"], retry_errors=retry_errors)
    run(job)
    with job.output.open("a") as file:
        file.write(json.dumps({"line": added, "error": None}) + "\n")
    before = job.output.read_bytes()
    with pytest.raises(ValueError, match=f"^output: {said}"):
        run_batch(job, FakeClient())
    assert job.output.read_bytes() == before


def test_two_jobs_cannot_write_one_file(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": "x"}])
    with job.output.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another job is writing"):
            run_batch(job, FakeClient())


SLOW_JOB = """
import sys, time
from pathlib import Path
from support.fake_client import FakeClient
from unit.batch.test_jobs import make_job
from saqqara.cluster.batch import job as jobs
from saqqara.cluster.cli import batch

class Slow(FakeClient):
    def poll(self, timeout_seconds=0.0):
        time.sleep(0.005)
        return super().poll(timeout_seconds)

lines = [{"prompt": f"row {i}"} for i in range(2000)]
jobs.launch_lasting = lambda config: Slow()
sys.exit(batch.run_and_summarise(make_job(Path(sys.argv[1]), lines), None, None))
"""


def interrupted(job: BatchJob, *signals: int) -> "subprocess.CompletedProcess[str]":
    """Run 2000 rows of a job in a process of its own, and send it signals once it writes."""
    tests = str(Path(__file__).parents[2])
    found = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", SLOW_JOB, str(job.output.parent)]
    env = os.environ | {"PYTHONPATH": found}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not job.output.exists() or job.output.stat().st_size < 20_000:
            assert process.poll() is None, "the job ended before it could be stopped"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for signum in signals:
            os.kill(process.pid, signum)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return subprocess.CompletedProcess(command, process.returncode, "", said)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_process_loses_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    lines = [{"prompt": f"row {i}"} for i in range(2000)]
    job = make_job(tmp_path, lines)
    # A stop may come as two signals, one to the process and one to its group.
    ended = interrupted(job, *([signum] if signum == signal.SIGKILL else [signum, signum]))
    if signum == signal.SIGKILL:
        assert ended.returncode == -signum
    else:
        assert ended.returncode == 128 + signum
        [line] = [text for text in ended.stderr.splitlines() if "stopped by" in text]
        there = job.output.read_bytes().count(b"\n")
        assert f"stopped by {signum.name}: {there} of 2000 rows are in {job.output}" in line
        assert "run the same command again" in line
        assert job.output.read_bytes().endswith(b"\n")
    summary = run_batch(job, FakeClient(per_poll=100))
    assert 0 < summary.resumed < 2000
    assert [record["line"] for record in records(job)] == list(range(1, 2001))


class Signalling(FakeClient):
    """Sends this process a signal once it has answered six requests."""

    def __init__(self, signum: signal.Signals, **settings: Any) -> None:
        super().__init__(**settings)
        self.signum = signum

    def poll(self, timeout_seconds: float = 0.0) -> list[Any]:
        if self.answered == 6:
            os.kill(os.getpid(), self.signum)
        return super().poll(timeout_seconds)


def test_a_signal_ends_a_job_and_leaves_the_handlers_as_they_were(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path, [{"prompt": f"row {i}"} for i in range(20)])
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    client = Signalling(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        run_batch(job, client)
    assert stopped.value.exit_code == 143
    # What the engine had finished when the signal came is written, too.
    assert len(records(job)) == client.answered
    assert f"stopped by SIGTERM: {client.answered} of 20 rows" in caplog.text
    after = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    assert after == before
    assert run_batch(job, FakeClient()).resumed == client.answered


STUCK = """
import signal, time
from saqqara.cluster.batch import stop
signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the suite runs in the background
stop._SAME_STOP_SECONDS = 0.0
with stop.StopSignals() as signals, signals.deferred():
    print("listening", flush=True)
    while signals.received is None:
        time.sleep(0.01)
    print("noted", signals.name, flush=True)
    time.sleep(600)
"""


def test_a_second_signal_ends_a_job_at_once() -> None:
    command = [sys.executable, "-c", STUCK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "listening\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "noted SIGTERM\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == -signal.SIGINT
        finally:
            process.kill()


def test_a_signal_ends_the_start_of_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def launch(config: EngineConfig) -> FakeClient:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have ended this")

    monkeypatch.setattr("saqqara.cluster.batch.job.launch_lasting", launch)
    with pytest.raises(Stopped):
        run_batch(make_job(tmp_path, [{"prompt": "x"}]))
    assert "stopped by SIGTERM: 0 of 1 rows" in caplog.text


def test_the_summary_is_json_that_can_be_read_back(tmp_path: Path) -> None:
    summary = run_batch(make_job(tmp_path, [{"prompt": "x"}, "bad"]), FakeClient())
    assert (summary.rows, summary.answered, summary.errors) == (2, 1, 1)
    assert summary.integrity == "ok, no page leaked"
    assert BatchSummary.model_validate_json(summary.model_dump_json()) == summary
