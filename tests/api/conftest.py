"""One server for most tests of this folder, and official OpenAI clients for it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI, OpenAI
from support.api_server import (
    KEY,
    MAX_BODY_BYTES,
    MAX_MODEL_LEN,
    MAX_QUEUE,
    OTHER_KEY,
    engine_flags,
)
from support.byte_llama import save_tiny_llama
from support.server import Server, running_server
from support.tool_models import TOOL_TEMPLATE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs Ray."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="package")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes with a long context, so that a request can be kept running.

    Its template knows tools.
    """
    folder = tmp_path_factory.mktemp("api-llama")
    save_tiny_llama(folder, max_position=MAX_MODEL_LEN, chat_template=TOOL_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def rank_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the logs of a server's ranks."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="package")
def server(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one replica, small limits, a folder of batches, and two keys."""
    folder = tmp_path_factory.mktemp("server")
    more = ["--max-queue", str(MAX_QUEUE), "--max-body-bytes", str(MAX_BODY_BYTES)]
    more += ["--batch-dir", str(folder / "batches")]
    keys = f"{OTHER_KEY},{KEY}"
    with running_server(folder / "log", *engine_flags(byte_model), *more, keys=keys) as server:
        yield server


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[OpenAI]:
    """The official client."""
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
async def async_client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    """The official client for asyncio."""
    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=60
    ) as client:
        yield client
