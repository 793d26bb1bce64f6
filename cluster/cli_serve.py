"""What `saqqara serve` does: a Serve config file and flags to a running server."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saqqara.configs.schema import ServeConfig

from .settings import read_serve_file, serve_config

DEFAULT_PORT = 8000


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """Flags of the server itself; None is what the file says, or the default."""

    host: str | None = None
    port: int | None = None
    served_model_name: str | None = None
    num_replicas: int | None = None
    api_key_file: str | None = None
    max_queue: int | None = None
    max_body_bytes: int | None = None
    drain_seconds: float = 600.0


def serve_until_stopped(file: str | None, flags: ServerFlags, engine: Mapping[str, Any]) -> None:
    """Run a server until SIGTERM.

    Raises:
        ValueError: a setting is wrong; names the field.
        RuntimeError: Ray Serve is not installed, or the server did not start.
    """
    args, http = ({}, {}) if file is None else read_serve_file(file)
    config = merged_config(args, flags, engine)
    host = flags.host or http.get("host") or "127.0.0.1"
    port = http.get("port", DEFAULT_PORT) if flags.port is None else flags.port
    try:
        from .serve import run_server
    except ImportError as error:
        raise RuntimeError(
            f"the server needs Ray Serve: pip install 'saqqara[serve]' ({error})"
        ) from error
    run_server(config, host, port, drain_seconds=flags.drain_seconds)


def merged_config(
    args: Mapping[str, Any], flags: ServerFlags, engine: Mapping[str, Any]
) -> ServeConfig:
    """Settings of a file with those of the command line over them.

    Raises:
        ValueError: a setting is wrong; names the field.
    """
    merged = {**args}
    engine = dict(engine)
    loading = dict(args.get("model_loading_config") or {})
    if (model := engine.pop("model", None)) is not None:
        loading = {"model_id": Path(model).name, "model_source": model}
    if flags.served_model_name is not None:
        loading["model_id"] = flags.served_model_name
    if not loading:
        raise ValueError("model is required: --model, or model_loading_config in the file")
    merged["model_loading_config"] = loading
    merged["engine_kwargs"] = {**(args.get("engine_kwargs") or {}), **engine}
    _set(merged, "deployment_config", num_replicas=flags.num_replicas)
    _set(merged, "limits", max_queue=flags.max_queue, max_body_bytes=flags.max_body_bytes)
    if flags.api_key_file is not None:
        merged["api_key_file"] = flags.api_key_file
    return serve_config(merged)


def _set(settings: dict[str, Any], name: str, **values: Any) -> None:
    given = {key: value for key, value in values.items() if value is not None}
    if given:
        settings[name] = {**(settings.get(name) or {}), **given}
