"""A small server with files and batches in this process, and official clients for it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
from openai import AsyncOpenAI
from openai.types import Batch

from saqqara.cluster.batch_store.store import Store
from saqqara.cluster.server.api_keys import ApiKeys
from saqqara.configs.schema import BatchLimits

from .batch_lines import ENDED, jsonl, named
from .in_process import InProcessServer

KEYS = ("key-a", "key-b")
_WAIT_SECONDS = 120.0


class BatchServer:
    """The application with a store, and a client for each key."""

    def __init__(self, model: Path, folder: Path, limits: BatchLimits, **store: Any) -> None:
        self.store = Store(folder, limits, **store)
        environ = {"SAQQARA_API_KEYS": ",".join(KEYS)}
        self.server = InProcessServer(
            model, keys=ApiKeys.load(environ=environ), store=self.store, check_integrity=True
        )
        self.app = self.server.app

    def http(self, key: str = KEYS[0]) -> httpx2.AsyncClient:
        """Plain HTTP."""
        return httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=self.app),
            base_url="http://127.0.0.1/v1",
            headers={"Authorization": f"Bearer {key}"},
        )

    def client(self, key: str = KEYS[0]) -> AsyncOpenAI:
        """The official client."""
        url = "http://127.0.0.1/v1"
        return AsyncOpenAI(base_url=url, api_key=key, max_retries=0, http_client=self.http(key))


@asynccontextmanager
async def batch_server(
    model: Path, folder: Path, limits: BatchLimits | None = None, **store: Any
) -> AsyncIterator[BatchServer]:
    """A server for as long as its application lives."""
    server = BatchServer(model, folder, limits or BatchLimits(), **store)
    async with server.app.router.lifespan_context(server.app):
        yield server


async def submit(
    client: AsyncOpenAI, lines: Iterable[Any], endpoint: Any = "/v1/chat/completions"
) -> Batch:
    """Upload lines and start a batch over them."""
    file = await client.files.create(file=named(jsonl(lines)), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h"
    )


async def ended(client: AsyncOpenAI, batch: Batch) -> Batch:
    """The batch once it has ended."""
    deadline = time.monotonic() + _WAIT_SECONDS
    while batch.status not in ENDED:
        assert time.monotonic() < deadline, batch
        await asyncio.sleep(0.02)
        batch = await client.batches.retrieve(batch.id)
    return batch


async def records(client: AsyncOpenAI, file_id: str | None) -> Mapping[str, Any]:
    """Records of an output or error file by their custom ids, each of which is there once."""
    if file_id is None:
        return {}
    text = (await client.files.content(file_id)).text
    found = [json.loads(line) for line in text.splitlines()]
    by_id = {record["custom_id"]: record for record in found}
    assert len(by_id) == len(found)
    return by_id
