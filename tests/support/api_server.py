"""The small server of the API tests: its model's name, its key and its limits."""

from pathlib import Path

KEY = "sk-test-7c1f"
MODEL = "tiny"
MAX_MODEL_LEN = 8192
NUM_SLOTS = 4
MAX_QUEUE = 4
MAX_BODY_BYTES = 100_000

ENGINE = {
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
