"""The small server of the API tests: its model's name, its key and its limits."""

from pathlib import Path
from typing import Any

import yaml

KEY = "sk-test-7c1f"
OTHER_KEY = "other"
MODEL = "tiny"
MAX_MODEL_LEN = 8192
NUM_SLOTS = 4
MAX_QUEUE = 4
MAX_BODY_BYTES = 100_000

ENGINE: dict[str, Any] = {
    "load_format": "dummy",
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "max_num_seqs": NUM_SLOTS,
    "kv_memory_gib": 0.1,
}


def engine_flags(model: Path) -> list[str]:
    """Flags of `saqqara serve` for a small engine with random weights."""
    flags = ["--model", str(model), "--served-model-name", MODEL]
    for name, value in ENGINE.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def write_two_stage_config(
    folder: Path, model: Path, rank_logs: Path, deployment: dict[str, Any], **more: Any
) -> str:
    """A Serve config file for replicas of two stages on few CPUs; `more` are fields beside."""
    args = {
        "model_loading_config": {"model_id": MODEL, "model_source": str(model)},
        "engine_kwargs": {**ENGINE, "pipeline_parallel_size": 2, "log_dir": str(rank_logs)},
        "deployment_config": {"ray_actor_options": {"num_cpus": 0}, **deployment},
        **more,
    }
    application = {
        "name": "saqqara",
        "route_prefix": "/",
        "import_path": "saqqara.cluster.on_ray.serve:build_app",
        "args": args,
    }
    file = folder / "server.yaml"
    file.write_text(yaml.safe_dump({"applications": [application]}))
    return str(file)
