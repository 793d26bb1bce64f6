"""The batch job of `chaos.py`, a process that can be killed: the same command goes on with it.

Its ranks have a layer that can be told to sleep, by a file. Its stages are on different nodes where
there are several.

    python tests/support/chaos_job.py INPUT OUTPUT MODEL LOG_DIR SUMMARY [TENSOR_SIZE]
"""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

# Read when Ray is imported; see tests/ray/conftest.py.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

from saqqara.cluster.batch.job import BatchJob, run_batch
from saqqara.cluster.failover import FailoverClient
from saqqara.cluster.on_ray.controller import start_controller
from saqqara.cluster.sampling import SamplingParams
from saqqara.configs.schema import EngineConfig
from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers.mesh.layout import MeshLayout
from saqqara.workers.worker import Worker

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class SleepyLayer:
    """A layer that sleeps for an hour once its file is there, which it removes."""

    def __init__(self, layer: Any, file: Path) -> None:
        self._layer = layer
        self._file = file

    def __getattr__(self, name: str) -> Any:
        if self._file.exists():
            self._file.unlink()
            time.sleep(3600)
        return getattr(self._layer, name)


class SleepyWorker(Worker):
    """A worker whose first layer is a `SleepyLayer`."""

    def __init__(
        self,
        config: WorkerSettings,
        layout: MeshLayout,
        rank: int = 0,
        store: tuple[str, int] | None = None,
        log_file: str | None = None,
    ) -> None:
        super().__init__(config, layout, rank, store, log_file)
        assert log_file is not None
        decoder: Any = self._shard.part.decoder
        first, *others = decoder.layers
        decoder.layers = (SleepyLayer(first, sleep_file(Path(log_file).parent, rank)), *others)


def sleep_file(log_dir: Path, rank: int) -> Path:
    """What sends a rank to sleep in its next step."""
    return log_dir / f"sleep-{rank}"


def make_job(
    source: Path, output: Path, model: Path, log_dir: Path, tensor_size: int = 2
) -> BatchJob:
    """The job: two stages, few slots, every step's pages proved."""
    config = EngineConfig(
        model=str(model),
        load_format="dummy",
        dtype="float32",
        device="cpu",
        executor="ray",
        tensor_parallel_size=tensor_size,
        pipeline_parallel_size=2,
        max_num_seqs=4,
        max_model_len=512,
        kv_memory_gib=0.05,
        num_threads=1,
        check_integrity=True,
        log_dir=str(log_dir),
    )
    return BatchJob(
        input=source,
        output=output,
        config=config,
        sampling=SamplingParams(temperature=0.0, ignore_eos=True),
        return_token_ids=True,
        max_in_flight=8,
    )


def main() -> None:
    """Run the job to its end."""
    source, output, model, log_dir, summary_file = map(Path, sys.argv[1:6])
    tensor_size = int(sys.argv[6]) if len(sys.argv) > 6 else 2
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    job = make_job(source, output, model, log_dir, tensor_size)
    config = job.config
    client = FailoverClient(
        lambda: start_controller(config, make_worker=SleepyWorker, strategy="SPREAD")
    )
    try:
        summary = run_batch(job, client)
    finally:
        client.shutdown()
    summary_file.write_text(summary.model_dump_json(), encoding="utf-8")


if __name__ == "__main__":
    main()
