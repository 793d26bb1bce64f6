"""A batch job under which nodes of a Ray cluster come and go, and what its answers should be."""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from saqqara.cluster.batch.job import run_batch
from saqqara.cluster.batch.summary import BatchSummary

from . import chaos_job
from .byte_llama import save_tiny_llama

logger = logging.getLogger(__name__)

RETENTIONS = ("full", {"method": "h2o", "budget": "25%", "decode": {"slack_pages": 1}})
ROWS_BETWEEN = 4
STUCK_SECONDS = 300.0


class NodeJob:
    """One job of `chaos_job` on a Ray cluster.

    Args:
        folder: for its files.
        num_rows: of its input.
        tensor_size: ranks of each of its two stages.
    """

    def __init__(self, folder: Path, num_rows: int, tensor_size: int = 2) -> None:
        self.log = folder / "log"
        self.log_dir = folder / "logs"
        self._source = folder / "in.jsonl"
        self._output = folder / "out.jsonl"
        self._summary = folder / "summary"
        self._model = folder / "model"
        self._num_rows = num_rows
        self._tensor_size = tensor_size
        self._process: subprocess.Popen[bytes] | None = None
        save_tiny_llama(self._model)
        rows = [
            {
                "prompt": f"row {i} " * (5 + i % 20),
                "max_tokens": 100,
                "retention": RETENTIONS[i % 2],
                "temperature": 0.8 if i % 3 == 0 else 0.0,
                "seed": i,
            }
            for i in range(num_rows)
        ]
        self._source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    @contextmanager
    def running(self, ray_address: str) -> Iterator[None]:
        """Run the job meanwhile; it is to end well."""
        arguments = [self._source, self._output, self._model, self.log_dir, self._summary]
        command = [sys.executable, chaos_job.__file__, *map(str, arguments), str(self._tensor_size)]
        env = os.environ | {"RAY_ADDRESS": ray_address}
        with self.log.open("wb") as log:
            process = self._process = subprocess.Popen(command, env=env, stderr=log)
        try:
            yield
            assert process.wait(STUCK_SECONDS) == 0, self._last_words()
        finally:
            process.kill()
            process.wait()

    def await_rows(self) -> None:
        """Wait until the job has written some rows more."""
        assert self._process is not None
        wanted = self._num_written() + ROWS_BETWEEN
        started = time.monotonic()
        while self._num_written() < wanted:
            assert self._process.poll() is None, self._last_words()
            assert time.monotonic() < started + STUCK_SECONDS, self._last_words()
            time.sleep(0.05)
        logger.info("%d rows more after %.1f s", ROWS_BETWEEN, time.monotonic() - started)

    def await_report(self) -> None:
        """Wait until the job has asked its engine again how it fares, which it does as it logs.

        What a controller has recovered from is known after its loss only if somebody asked before.
        """
        assert self._process is not None
        started = time.monotonic()
        before = self._num_logged()
        while self._num_logged() == before:
            assert self._process.poll() is None, self._last_words()
            assert time.monotonic() < started + STUCK_SECONDS, self._last_words()
            time.sleep(0.05)

    def check_answers(self) -> None:
        """Assert that each row has the one answer that it has in a process of its own."""
        alone = self._output.with_name("alone.jsonl")
        job = chaos_job.make_job(self._source, alone, self._model, self.log_dir)
        sizes = {"executor": "local", "tensor_parallel_size": 1, "pipeline_parallel_size": 1}
        assert run_batch(replace(job, config=job.config.model_copy(update=sizes))).complete
        assert self._tokens(self._output) == self._tokens(alone)

    def recoveries(self) -> dict[str, int]:
        """How often what was lost, by the job's report, which says that its pages are sound."""
        summary = BatchSummary.model_validate_json(self._summary.read_text())
        assert summary.integrity == "ok, owners proved"
        assert summary.report is not None
        return dict(summary.report.recoveries)

    def _num_logged(self) -> int:
        return self.log.read_text().count(f" of {self._num_rows} rows, ")

    def _num_written(self) -> int:
        return self._output.read_bytes().count(b"\n") if self._output.exists() else 0

    def _tokens(self, output: Path) -> dict[int, list[int]]:
        """The tokens of each line's answer; a line has one record, and it is no error."""
        records = [json.loads(line) for line in output.read_text().splitlines()]
        lines = sorted(record["line"] for record in records)
        assert lines == list(range(1, self._num_rows + 1))
        assert not [record for record in records if record.get("error") is not None]
        return {record["line"]: record["token_ids"] for record in records}

    def _last_words(self) -> str:
        return self.log.read_text()[-4000:]
