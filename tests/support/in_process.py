"""The HTTP API in this process, without a server: requests go to its ASGI application."""

import asyncio
import json
from pathlib import Path
from typing import Any

from saqqara.cluster.batch_store.store import Store
from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import LocalExecutor
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.server.api_keys import ApiKeys
from saqqara.cluster.server.app import make_app
from saqqara.cluster.server.generation import Generation
from saqqara.cluster.settings import serve_config, served_engine
from saqqara.workers.models.spec import load_spec

from .api_server import ENGINE, MODEL


class InProcessServer:
    """A small engine behind the application; call it inside one event loop.

    Args:
        model: folder of its model, which gets random weights.
        keys: who may use it; default: everybody.
        store: its files and batches.
        settings: fields of the engine beside those of the API tests' server.

    Attributes:
        app: the application.
    """

    def __init__(
        self,
        model: Path,
        keys: ApiKeys | None = None,
        store: Store | None = None,
        **settings: Any,
    ) -> None:
        loading = {"model_id": MODEL, "model_source": str(model)}
        config = serve_config(
            {"model_loading_config": loading, "engine_kwargs": {**ENGINE, **settings}}
        )
        engine_config = served_engine(config)
        tokenizers = [Tokenizer.load(model), Tokenizer.load(model)]
        engine = Engine(
            engine_config, LocalExecutor(engine_config), tokenizers[0], load_spec(str(model))
        )
        self.generation = Generation(config, engine_config, engine, tokenizers[1])
        self.app = make_app(self.generation, keys or ApiKeys(), store=store)

    async def post(self, path: str, body: Any, raw: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON of the answer to a POST; events of a stream come as a list."""
        content = json.dumps(body).encode() if raw is None else raw
        headers = {b"content-type": b"application/json"}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": list(headers.items()),
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        sent: list[dict[str, Any]] = []
        given = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if given:
                return given.pop()
            await asyncio.Event().wait()
            raise AssertionError("the event is never set")

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        status = next(m["status"] for m in sent if m["type"] == "http.response.start")
        text = b"".join(m.get("body", b"") for m in sent).decode()
        if not text.startswith("data: "):
            return status, json.loads(text)
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        return status, [json.loads(event) for event in events if event != "[DONE]"]
