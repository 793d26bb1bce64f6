"""What `saqqara serve` does: a Serve config file and flags to a running server."""

import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from saqqara.cluster.server.ports import DEFAULT_PORT, LOOPBACK, Binding, ReservedPort
from saqqara.cluster.server.stop_signals import StopSignals
from saqqara.cluster.settings import ServeFile, read_serve_file, serve_config, served_engine
from saqqara.configs.schema import ServeConfig
from saqqara.workers.models.source import local_folder


@dataclass(frozen=True, slots=True)
class ServerFlags:
    """Flags of the server itself; None is what the file says, or the default."""

    host: str | None = None
    port: int | None = None
    served_model_names: tuple[str, ...] = ()
    num_replicas: int | None = None
    min_replicas: int | None = None
    max_replicas: int | None = None
    api_key_file: str | None = None
    max_queue: int | None = None
    max_body_bytes: int | None = None
    body_timeout_seconds: float | None = None
    default_timeout_seconds: float | None = None
    max_timeout_seconds: float | None = None
    route_prefix: str | None = None
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    enable_tokenizer_info_endpoint: bool = False
    batch_dir: str | None = None
    ui: bool | None = None
    drain_seconds: float = 600.0


def serve_until_stopped(file: str | None, flags: ServerFlags, engine: Mapping[str, Any]) -> None:
    """Run a server until SIGTERM, which may come at any time.

    Raises:
        ValueError: a setting is wrong; names the field.
        PortInUseError: somebody listens on the port.
        RuntimeError: Ray Serve is not installed, or the server did not start.
    """
    with StopSignals() as signals:  # before the imports, which take seconds
        given = ServeFile() if file is None else read_serve_file(file)
        config = merged_config(given.args, flags, engine)
        asked = Binding(
            host=flags.host or given.http.get("host"),
            port=given.http.get("port") if flags.port is None else flags.port,
            route_prefix=flags.route_prefix or given.route_prefix,
            app_name=given.name,
        )
        if os.environ.get("RAY_ADDRESS"):  # its head node has the port, and perhaps Serve already
            _run(config, asked, signals, flags.drain_seconds)
            return
        local_folder(served_engine(config).model)  # of this machine, whose Ray it will be
        host, port = asked.host or LOOPBACK, DEFAULT_PORT if asked.port is None else asked.port
        with ReservedPort(host, port) as reserved:
            asked = replace(asked, host=host, port=reserved.port)
            _run(config, asked, signals, flags.drain_seconds)


def _run(config: ServeConfig, asked: Binding, signals: StopSignals, drain_seconds: float) -> None:
    try:
        with signals.interrupting():
            from saqqara.cluster.on_ray.serve_run import run_server
    except ImportError as error:
        raise RuntimeError(
            f"the server needs Ray Serve: pip install 'saqqara[serve]' ({error})"
        ) from error
    run_server(config, asked, signals, drain_seconds=drain_seconds)


def exit_at_once() -> NoReturn:
    """End this process without tearing the interpreter down, which takes seconds after Ray."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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
    if flags.served_model_names:
        loading["model_id"], *aliases = flags.served_model_names
        merged["model_aliases"] = aliases
    if not loading:
        raise ValueError("model is required: --model, or model_loading_config in the file")
    merged["model_loading_config"] = loading
    merged["engine_kwargs"] = {**(args.get("engine_kwargs") or {}), **engine}
    _set_replicas(merged, flags)
    _set(
        merged,
        "limits",
        max_queue=flags.max_queue,
        max_body_bytes=flags.max_body_bytes,
        body_timeout_seconds=flags.body_timeout_seconds,
        default_timeout_seconds=flags.default_timeout_seconds,
        max_timeout_seconds=flags.max_timeout_seconds,
    )
    if flags.allowed_origins:
        merged["allowed_origins"] = flags.allowed_origins
    if flags.chat_template is not None:
        merged["chat_template"] = flags.chat_template
    for name in ("trust_request_chat_template", "enable_tokenizer_info_endpoint"):
        if getattr(flags, name):
            merged[name] = True
    if flags.batch_dir is not None:
        merged["batch_dir"] = flags.batch_dir
    if flags.ui is not None:
        merged["ui"] = flags.ui
    if flags.allowed_hosts:
        merged["allowed_hosts"] = flags.allowed_hosts
    if flags.api_key_file is not None:
        merged["api_key_file"] = flags.api_key_file
    return serve_config(merged)


def _set_replicas(merged: dict[str, Any], flags: ServerFlags) -> None:
    """A fixed number of replicas, or bounds of one; flags for one end the other of the file."""
    bounds = {"min_replicas": flags.min_replicas, "max_replicas": flags.max_replicas}
    bounds = {name: value for name, value in bounds.items() if value is not None}
    if not bounds:
        if flags.num_replicas is not None:
            given = {**(merged.get("deployment_config") or {}), "num_replicas": flags.num_replicas}
            given.pop("autoscaling_config", None)
            merged["deployment_config"] = given
        return
    if flags.num_replicas is not None:
        raise ValueError("give --num-replicas, or --min-replicas and --max-replicas, not both")
    given = dict(merged.get("deployment_config") or {})
    given.pop("num_replicas", None)
    given["autoscaling_config"] = {**(given.get("autoscaling_config") or {}), **bounds}
    merged["deployment_config"] = given


def _set(settings: dict[str, Any], name: str, **values: Any) -> None:
    given = {key: value for key, value in values.items() if value is not None}
    if given:
        settings[name] = {**(settings.get(name) or {}), **given}
