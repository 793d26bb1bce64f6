"""One local Ray for the engines of a module."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """The Ray that an engine would start itself, for one engine after the other."""
    import ray  # here: some of the tests set what is read when Ray is imported

    from saqqara.cluster.on_ray.controller import connect

    assert connect()
    yield
    ray.shutdown()
