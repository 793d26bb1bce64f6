"""Starts an engine where the configuration says, in this process or on Ray, and logs what it is."""

import logging

import numpy as np

from saqqara.cluster.engine.client import EngineClient, EngineDescription, LocalClient
from saqqara.cluster.presets import INSTEAD, ModelPresets
from saqqara.compression.retention import Retention
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.spec import load_spec
from saqqara.workers.plan import WorkerInfo, WorkerMemory, layers_of

from .failover import FailoverClient
from .long_wait import LongWait

logger = logging.getLogger(__name__)

MIB = 2**20


def launch(config: EngineConfig) -> EngineClient:
    """Start an engine and wait until it can take requests.

    Ray is imported only for `executor="ray"`.

    Raises:
        ValueError: a setting does not fit the model or the machine.
    """
    client: EngineClient
    if config.executor == "local":
        with LongWait(f"starting {config.model}"):
            client = LocalClient(config)
    else:
        from saqqara.cluster.on_ray.controller import start_controller

        with LongWait("connecting to Ray and starting its processes"):
            client = start_controller(config)
    engine = client.describe()
    for line in start_lines(engine):
        logger.info("%s", line)
    asked = Retention.parse(config.retention, config.budget)
    if config.executor == "ray" and asked.needs_profile and _method(engine.config) == INSTEAD:
        logger.warning("%s", ModelPresets.of(config).note("the controller's host has no profile"))
    return client


def launch_lasting(config: EngineConfig) -> EngineClient:
    """As `launch`, for jobs: an engine that outlives its controller, where it has one.

    Raises:
        ValueError: a setting does not fit the model or the machine.
    """
    return launch(config) if config.executor == "local" else FailoverClient(lambda: launch(config))


def start_lines(engine: EngineDescription) -> list[str]:
    """What has started: model, each worker's shard, device, backend and pool, what fits."""
    config = engine.config
    lines = [f"{config.model} started in {engine.start_seconds:.1f} s"]
    lines += [_worker_line(worker) for worker in engine.workers]
    num_tokens = config.max_model_len or load_spec(config.model).max_position
    retention = Retention.parse(config.retention, config.budget)
    lines.append(
        f"retention {retention.method}: the pool holds {sequences_that_fit(engine, num_tokens)} "
        f"prompts of {num_tokens} tokens at once; max_num_seqs={config.max_num_seqs}"
    )
    lines += _local_line(engine)
    if engine.log_dir is not None:
        lines.append(f"logs of the ranks: {engine.log_dir}")
    if engine.metrics_address is not None:
        lines.append(f"metrics: http://{engine.metrics_address}/metrics")
    return lines


def _method(config: EngineConfig) -> str:
    return Retention.parse(config.retention, config.budget).method


def _local_line(engine: EngineDescription) -> list[str]:
    """What layers with a window hold of a sequence, whatever the retention, if there are any."""
    layers, worker = layers_of(engine.workers), engine.workers[0]
    if not layers.local_layers:
        return []
    num_heads = max(w.stop_head for w in engine.workers)
    pages = len(layers.local_layers) * num_heads * -(-layers.window // worker.page_tokens)
    return [
        f"budgets are of the {len(layers.global_layers)} layers that see all tokens; the other "
        f"{len(layers.local_layers)} hold a window of {layers.window} tokens, at most "
        f"{pages * worker.page_bytes / MIB:.1f} MiB a sequence"
    ]


def _worker_line(w: WorkerInfo) -> str:
    return (
        f"rank {w.rank} on {w.hostname}: layers {w.start_layer} to {w.stop_layer - 1}, "
        f"kv heads {w.start_head} to {w.stop_head - 1}, {w.device}, {w.dtype} "
        f"({w.dtype_reason}), attention {w.attention_backend} ({w.attention_reason}), "
        f"linear {w.linear_backend} ({w.linear_reason}), "
        f"weights {w.memory.weight_bytes / MIB:.0f} MiB, pool {w.memory.pool_bytes / MIB:.0f} MiB "
        f"= {w.num_pages} pages of {w.page_tokens} tokens{_beside_the_pool(w.memory)}"
        + (
            f", host memory for parked sequences {w.host_kv_bytes / MIB:.0f} MiB"
            if w.host_kv_bytes
            else ""
        )
    )


def _beside_the_pool(memory: WorkerMemory) -> str:
    """What else a GPU will hold, for which its pool leaves room."""
    parts = {
        "tables": memory.table_bytes,
        "temporaries of a step": memory.temporary_bytes,
        "graphs": memory.graph_bytes,
        "rings and sums": memory.remembered_bytes,
    }
    if memory.temporary_bytes == 0:
        return ""
    return "".join(f", {name} {size / MIB:.0f} MiB" for name, size in parts.items() if size)


def sequences_that_fit(engine: EngineDescription, num_tokens: int) -> int:
    """How many prompts of this length the page pools hold at once, under the engine's retention."""
    retention = Retention.parse(engine.config.retention, engine.config.budget)
    num_heads = max(w.stop_head for w in engine.workers)
    kept_LH = retention.row_tokens(num_tokens, layers_of(engine.workers), num_heads)
    fits = []
    for w in engine.workers:
        own = kept_LH[w.start_layer : w.stop_layer, w.start_head : w.stop_head]
        num_pages = int(np.ceil(own / w.page_tokens).sum())
        fits.append(w.num_pages // num_pages)
    return min(fits)
