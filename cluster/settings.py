"""Settings from outside (keyword arguments, YAML, flags) to checked objects, with clear errors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from saqqara.configs.names import closest, did_you_mean
from saqqara.configs.schema import EngineConfig, ServeConfig
from saqqara.configs.vllm_names import REVISION, with_our_names, with_revision
from saqqara.configs.yaml_files import load_yaml

from .sampling import SamplingParams

SAMPLING_KEY = "sampling"
MEANT = {
    "gpu": "cuda",
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
}
"""Other names of values, which no likeness of letters finds."""


def check_keys(given: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Raise a ValueError that names the first unknown key, with a close match if there is one.

    Args:
        given: the keys that somebody wrote.
        known: the keys that there are.
        where: what the keys belong to, put before the message.
    """
    known = sorted(known)
    for key in given:
        if key in known:
            continue
        hint = did_you_mean(str(key), known)
        raise ValueError(f"{where}{': ' if where else ''}unknown key {key!r}; {hint}")


def engine_config(settings: Mapping[str, Any], where: str = "") -> EngineConfig:
    """Validate engine settings; None stands for a field's default, vLLM's names for ours.

    Raises:
        ValueError: in one line, which field is wrong and what would be right.
    """
    settings = with_revision(with_our_names(settings, where), where)
    _check_engine_keys(settings, EngineConfig.model_fields, where)
    try:
        return EngineConfig(**{k: v for k, v in settings.items() if v is not None})
    except ValidationError as error:
        raise ValueError(validation_message(error)) from None


def _check_engine_keys(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """As `check_keys`, but a sampling setting among the engine's is told where it belongs."""
    before = f"{where}: " if where else ""
    for key in given:
        if key in SamplingParams.model_fields and key not in known:
            raise ValueError(
                f"{before}{key} is a sampling setting, not the engine's; in a file it stands under "
                f"`{SAMPLING_KEY}:`, in Python in SamplingParams({key}=...)"
            )
    check_keys(given, known, where)


def serve_config(settings: Mapping[str, Any]) -> ServeConfig:
    """Validate the settings of a server.

    Raises:
        ValueError: in one line, which field is wrong and what would be right.
    """
    check_keys(settings, ServeConfig.model_fields)
    try:
        config = ServeConfig.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {message[:1].lower()}{message[1:]}") from None
    served_engine(config)
    return config


def served_engine(config: ServeConfig) -> EngineConfig:
    """Settings of the engine in every replica of a server.

    One rank runs in the replica's process unless `executor` says otherwise, several run on Ray.

    Raises:
        ValueError: in one line, which field is wrong and what would be right.
    """
    given = dict(config.engine_kwargs)
    if "model" in given:
        raise ValueError("engine_kwargs: model is set by model_loading_config.model_source")
    if given.get("metrics_port") is not None:
        raise ValueError("engine_kwargs: metrics_port has no use here; the server has /metrics")
    model = config.model_loading_config
    given["model"] = model.model_source or model.model_id
    sizes = (given.get("tensor_parallel_size", 1), given.get("pipeline_parallel_size", 1))
    if sizes != (1, 1):
        given.setdefault("executor", "ray")
    return engine_config(given, "engine_kwargs")


@dataclass(frozen=True, slots=True)
class ServeFile:
    """What a Serve config file says of a server of ours: the only application in it.

    Attributes:
        args: its settings, fields of `ServeConfig`.
        http: Serve's `http_options`.
    """

    args: Mapping[str, Any] = field(default_factory=dict)
    http: Mapping[str, Any] = field(default_factory=dict)
    name: str = "saqqara"
    route_prefix: str = "/"


def read_serve_file(path: str) -> ServeFile:
    """A Serve config file or preset.

    Raises:
        ValueError: an unreadable file, or one that `serve run` could not use for a server of ours.
    """
    data = load_yaml(path)
    applications = data.get("applications")
    if not isinstance(applications, list) or len(applications) != 1:
        raise ValueError(f"config {path}: applications must be a list with one application")
    application = applications[0] if isinstance(applications[0], dict) else {}
    args = application.get("args")
    if not isinstance(args, dict):
        raise ValueError(f"config {path}: applications[0].args must be a mapping of settings")
    check_keys(args, ServeConfig.model_fields, f"config {path}: applications[0].args")
    http = data.get("http_options") or {}
    if not isinstance(http, dict):
        raise ValueError(f"config {path}: http_options must be a mapping")
    given = {key: application[key] for key in ("name", "route_prefix") if application.get(key)}
    return ServeFile(args, http, **given)


def sampling_params(settings: Mapping[str, Any], where: str = "") -> SamplingParams:
    """Validate sampling settings.

    Raises:
        ValueError: in one line, which field is wrong and what would be right.
    """
    check_keys(settings, SamplingParams.model_fields, where)
    try:
        return SamplingParams(**settings)
    except ValidationError as error:
        raise ValueError(validation_message(error)) from None


def validation_message(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line: field, what is wrong, what was given."""
    first = error.errors()[0]
    # Members of a union come as further parts, such as budget.int; the field is what was written.
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "missing":
        return f"{name} is required"
    message = first["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    if not name:
        return message
    text = f"{name}: {message[:1].lower()}{message[1:]}"
    if first["type"] == "value_error" and str(first["input"]) in message:
        return text
    close = None
    if first["type"] == "literal_error":
        choices = re.findall(r"'([^']+)'", first["ctx"]["expected"])
        meant = MEANT.get(str(first["input"]).lower())
        close = meant if meant in choices else closest(str(first["input"]), choices)
    return f"{text} (got {first['input']!r}{'' if close is None else f'; did you mean {close!r}?'})"


def read_config_file(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Engine settings and sampling settings of a YAML file or preset.

    Sampling settings stand under the key `sampling`; every other key is an engine setting.

    Raises:
        ValueError: an unknown key or an unreadable file, named.
    """
    settings = load_yaml(path)
    sampling = settings.pop(SAMPLING_KEY, None) or {}
    settings = with_our_names(settings, f"config {path}")
    known = [*EngineConfig.model_fields, REVISION, SAMPLING_KEY]
    _check_engine_keys(settings, known, f"config {path}")
    if not isinstance(sampling, dict):
        raise ValueError(f"config {path}: {SAMPLING_KEY} must be a mapping of sampling settings")
    return settings, sampling
