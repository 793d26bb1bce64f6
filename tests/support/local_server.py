"""The HTTP API on a real port without Ray: uvicorn in a thread of this process."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from saqqara.cluster.batch_store.store import Store
from saqqara.cluster.chat import read_template
from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.executor import LocalExecutor
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.server.api_keys import ApiKeys
from saqqara.cluster.server.app import make_app
from saqqara.cluster.server.generation import Generation
from saqqara.cluster.settings import serve_config, served_engine
from saqqara.workers.models.spec import load_spec

START_SECONDS = 60.0
STOP_SECONDS = 60.0


@contextmanager
def listening(app: FastAPI, prefix: str = "") -> Iterator[str]:
    """Serve an application at a free port of loopback; yields the URL below which its paths are.

    Args:
        app: the application; it is ended with the server.
        prefix: what stands before its paths, as with `--route-prefix`.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            _below(app, prefix),
            log_level="warning",
            timeout_keep_alive=90,  # as Serve's proxy: clients keep connections for later
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + START_SECONDS
            while not server.started:
                assert thread.is_alive(), "the server has ended while it started"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}{prefix}"
        finally:
            server.should_exit = True
            thread.join(STOP_SECONDS)
            assert not thread.is_alive(), "the server did not end"


def engine_app(model: Path, keys: Sequence[str] = (), **fields: Any) -> FastAPI:
    """The application of a server whose one rank runs in this process.

    Args:
        model: the model's folder.
        keys: API keys.
        fields: of `ServeConfig`, such as `engine_kwargs`.
    """
    loading = {"model_id": model.name, "model_source": str(model)}
    config = serve_config({"model_loading_config": loading, **fields})
    engine_config = served_engine(config)
    template = None if config.chat_template is None else read_template(config.chat_template)
    tokenizers = [Tokenizer.load(model, template), Tokenizer.load(model, template)]
    engine = Engine(
        engine_config,
        LocalExecutor(engine_config),
        tokenizers[0],
        load_spec(str(model)),
        model_name=config.model_loading_config.model_id,
    )
    generation = Generation(config, engine_config, engine, tokenizers[1])
    environ: Mapping[str, str] = {"SAQQARA_API_KEYS": ",".join(keys)} if keys else {}
    store = None if config.batch_dir is None else Store(Path(config.batch_dir), config.batches)
    return make_app(
        generation,
        ApiKeys.load(None, environ),
        config.allowed_origins,
        store,
        ui=config.ui,
        allowed_hosts=config.allowed_hosts,
    )


def _below(app: FastAPI, prefix: str) -> FastAPI:
    if not prefix:
        return app
    outer = FastAPI(lifespan=app.router.lifespan_context)  # a mounted one's is not run
    outer.mount(prefix, app)
    return outer
