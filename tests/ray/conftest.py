"""One local Ray for all tests of this folder, and the tiny model that its engines run."""

import os
from collections.abc import Iterator
from pathlib import Path

# Read when Ray is imported or a process of it starts. Without it, Ray warns of a change to come in
# what it does with CUDA_VISIBLE_DEVICES for actors that have no GPU, as all of ours here.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray runs workers as background jobs; on a busy machine tests would wait for them for minutes.
os.environ.setdefault("RAY_worker_niceness", "0")

import pytest
import ray
from support import fake_worker
from support.byte_llama import save_tiny_llama

from saqqara.configs.schema import EngineConfig

OBJECT_STORE_BYTES = 100 * 2**20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs Ray."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray with a small object store and no dashboard, ended with the session."""
    # Ranks cannot import what lies among the tests.
    ray.cloudpickle.register_pickle_by_value(fake_worker)
    # Unix sockets lie in the folder, and their paths may have 107 characters.
    folder = tmp_path_factory.mktemp("r", numbered=True)
    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=str(folder),
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config and tokenizer of a tiny Llama; `load_format="dummy"` fills it."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    return folder


@pytest.fixture
def tiny_config(tiny_model: Path, tmp_path: Path) -> EngineConfig:
    """An engine on Ray with random weights and small pools; tests change what they are about."""
    return EngineConfig(
        model=str(tiny_model),
        load_format="dummy",
        dtype="float32",
        device="cpu",
        executor="ray",
        max_model_len=256,
        max_num_seqs=8,
        kv_memory_gib=0.02,
        num_threads=1,
        log_dir=str(tmp_path / "logs"),
    )
