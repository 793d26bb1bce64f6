"""What all tests share: few threads, no hub, and the demo model."""

import os
from pathlib import Path

# Read when torch, tokenizers and huggingface_hub are first imported, so set before that. The
# tensors of the tests are small: more threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Also read at import: without a GPU, Triton's kernels are run by its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import settings

from saqqara.workers.gguf.demo import fetch_demo_model

settings.register_profile("saqqara", deadline=None)  # the first call of a kernel may be slow
settings.load_profile("saqqara")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The folder of SmolLM2-135M-Instruct; the first use on a machine downloads it."""
    return fetch_demo_model()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the demo model, so that `-m "not model"` runs without it."""
    for item in items:
        if "demo_model" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.model)
