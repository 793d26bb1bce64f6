"""Command-line flags for every setting, made from the settings' own definitions.

A command decorated with `with_settings` takes `settings: Settings` and gets `--config` and one flag
per field of `EngineConfig` (and of `SamplingParams`, where it wants them). Values are checked in
one place, by those classes, whether they come from YAML or from a flag, and errors are reported in
one line.
"""

import functools
import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from saqqara.cluster.long_wait import LongWait
from saqqara.cluster.sampling import SamplingParams
from saqqara.cluster.settings import engine_config, read_config_file, sampling_params
from saqqara.compression.retention import Retention
from saqqara.configs import vllm_names
from saqqara.configs.reuse import ReuseConfig
from saqqara.configs.schema import EngineConfig
from saqqara.configs.shown import shown
from saqqara.configs.yaml_files import parse_yaml
from saqqara.workers.models.source import local_folder

from .help import errors_in_one_line as errors_in_one_line

logger = logging.getLogger(__name__)

Command = Callable[..., None]
Fields = Mapping[str, FieldInfo]

PANELS = {
    "Model": (
        *("model", "tokenizer", "load_format", "dtype", "device", "seed", "max_model_len"),
        "attention_backend",
        "linear_backend",
        "cuda_graphs",
    ),
    "Chats": ("tool_call_parser", "reasoning_parser"),
    "Retention": ("retention", "budget", "profile_dir"),
    "Memory and scheduling": (
        *("kv_memory_gib", "memory_utilization", "page_tokens", "max_num_seqs"),
        *("max_prefill_tokens", "prefill_quantum", "max_extend_tokens", "linear_chunk_tokens"),
    ),
    "Memory used again": tuple(ReuseConfig.model_fields),
    "Processes": (
        *("executor", "tensor_parallel_size", "pipeline_parallel_size", "layer_split"),
        "num_threads",
    ),
}
"""Headings in the help for engine settings; what is in none stands under `Engine`."""

QUIET_SECONDS = 4.8  # more than those of waits within a command, which say more

ENGINE_PREFIX = "engine_"
SAMPLING_PREFIX = "sampling_"
VLLM_PREFIX = "vllm_"


@dataclass(frozen=True, slots=True)
class Settings:
    """The checked settings of one command."""

    config: EngineConfig
    sampling: SamplingParams


def with_settings(
    sampling: bool = True,
    without: Collection[str] = (),
    checked: bool = True,
    watched: bool = False,
) -> Callable[[Command], Command]:
    """Give a command `--config` and a flag per setting; it receives them as `settings`.

    Args:
        sampling: whether the command also has flags for `SamplingParams`.
        without: fields of `EngineConfig` that get no flag, because the command has its own.
        checked: without it `settings` are the engine settings that were written, as a mapping,
            for a command that has others beside them.
        watched: whether a line is logged every few seconds while the command runs and nothing else
            is; a terminal has bars instead.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command).parameters
        known = EngineConfig.model_fields
        ordered = sorted(known, key=ReuseConfig.model_fields.__contains__)  # inherited ones last
        fields = {name: known[name] for name in ordered if name not in without}
        flags = [_config_flag(), *_flags(fields, ENGINE_PREFIX, "Engine")]
        names = [name for name in vllm_names.ALL if name not in own]
        flags += [_vllm_flag(name) for name in names]
        if sampling:
            flags += _flags(
                SamplingParams.model_fields, SAMPLING_PREFIX, "Sampling", EngineConfig.model_fields
            )

        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            written = {flag.name: given.pop(flag.name) for flag in flags}
            quiet = not watched or sys.stderr.isatty()
            name = command.__name__.replace("_", "-")
            with errors_in_one_line(), nullcontext() if quiet else LongWait(name, QUIET_SECONDS):
                engine, params = _written(written)
                if checked:
                    settings = Settings(engine_config(engine), sampling_params(params))
                    # A mistake in it is known before anything is loaded.
                    Retention.parse(settings.config.retention, settings.config.budget)
                    _check_log_dir(settings.config)
                    local_folder(settings.config.model)
                    if settings.config.tokenizer is not None:
                        local_folder(settings.config.tokenizer, "tokenizer")
                    command(**given, settings=settings)
                else:
                    command(**given, settings=engine)

        kept = [p.replace(kind=p.KEYWORD_ONLY) for n, p in own.items() if n != "settings"]
        wrapped.__signature__ = inspect.Signature([*kept, *flags])  # type: ignore[attr-defined]
        wrapped.__annotations__ = {p.name: p.annotation for p in [*kept, *flags]}
        return wrapped

    return decorate


def _check_log_dir(config: EngineConfig) -> None:
    if config.log_dir is not None and os.path.isfile(config.log_dir):
        raise ValueError(f"log_dir: {config.log_dir} is a file; it must be a folder")


def _written(written: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Engine and sampling settings: those of the YAML file, then of the command line."""
    engine: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    if written["config"]:
        engine, sampling = read_config_file(written["config"])
    for name, value in vllm_names.with_our_names(_vllm_settings(written)).items():
        engine[name] = value
    for name, value in written.items():
        if value == "":
            raise ValueError(f"{_flag_of(name)} is empty; give it a value, or leave it off")
        if value is None or name == "config" or name.startswith(VLLM_PREFIX):
            continue
        if name.startswith(ENGINE_PREFIX):
            field = name.removeprefix(ENGINE_PREFIX)
            engine[field] = _value(value, EngineConfig.model_fields[field])
        else:
            field = name.removeprefix(SAMPLING_PREFIX)
            sampling[field] = _value(value, SamplingParams.model_fields[field])
    return engine, sampling


def _flag_of(name: str) -> str:
    """The flag of a parameter; that of a sampling setting may have its panel in front."""
    is_taken = name.removeprefix(SAMPLING_PREFIX) in EngineConfig.model_fields
    for prefix in (ENGINE_PREFIX, VLLM_PREFIX, *(() if is_taken else (SAMPLING_PREFIX,))):
        name = name.removeprefix(prefix)
    return f"--{name.replace('_', '-')}"


def _vllm_settings(written: Mapping[str, Any]) -> dict[str, Any]:
    """What was written with vLLM's names, as YAML would read it; our flag beside one is a clash."""
    found = {}
    for name, value in written.items():
        if value is None or not name.startswith(VLLM_PREFIX):
            continue
        name = name.removeprefix(VLLM_PREFIX)
        ours = vllm_names.SAME.get(name) or vllm_names.VALUES.get(name, ("", {}))[0]
        if written.get(f"{ENGINE_PREFIX}{ours}") is not None:
            flags = [f"--{flag.replace('_', '-')}" for flag in (name, ours)]
            raise ValueError(f"{flags[0]} means {flags[1]}; give one of them")
        found[name] = value if name == vllm_names.REVISION else _from_yaml(value)
    return found


def _vllm_flag(name: str) -> inspect.Parameter:
    """A flag that vLLM's users know; the help leaves it out."""
    option = typer.Option(f"--{name.replace('_', '-')}", hidden=True)
    kind: Any = bool if name in vllm_names.BOOLEAN else str
    return _parameter(VLLM_PREFIX + name, kind | None, option)


def _config_flag() -> inspect.Parameter:
    text = "YAML file, or the name of a preset in configs/; flags override it."
    option = typer.Option("--config", help=text, metavar="FILE")
    return _parameter("config", str | None, option)


def _flags(
    fields: Fields, prefix: str, panel: str, taken: Fields | None = None
) -> list[inspect.Parameter]:
    """One optional flag per field; a name that is `taken` gets its panel in front."""
    flags = []
    for name, field in fields.items():
        flag = name.replace("_", "-")
        if taken is not None and name in taken:
            flag = f"{panel.lower()}-{flag}"
        is_bool = field.annotation is bool
        is_list = _is_list_of_strings(field)
        option = typer.Option(
            f"--{flag}/--no-{flag}" if is_bool else f"--{flag}",
            help=_help(field),
            metavar=None if is_bool else _metavar(field),
            show_default=False,
            rich_help_panel=_panel(name) if prefix == ENGINE_PREFIX else panel,
        )
        kind: Any = bool if is_bool else list[str] if is_list else str
        flags.append(_parameter(prefix + name, kind | None, option))
    return flags


def _panel(name: str) -> str:
    """The heading that an engine setting stands under."""
    return next((panel for panel, names in PANELS.items() if name in names), "Engine")


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _value(text: Any, field: FieldInfo) -> Any:
    """What a flag's text means: as it stands for strings, else as YAML would read it."""
    if not isinstance(text, str) or _members(field) == (str,) or _is_list_of_strings(field):
        return text
    if any(get_origin(member) is tuple for member in _members(field)) and "[" not in text:
        text = f"[{text}]"  # --layer-split 16,14
    return _from_yaml(text)


def _from_yaml(text: Any) -> Any:
    """What YAML reads; the text itself, where it is none, for the field's own check to refuse."""
    try:
        return parse_yaml(text) if isinstance(text, str) else text
    except ValueError as error:
        if text.lstrip().startswith("{"):
            raise ValueError(f"{shown(text)} is {error}") from None
        return text


def _members(field: FieldInfo) -> tuple[Any, ...]:
    """The alternatives of a field's type, without None."""
    annotation = field.annotation
    if get_origin(annotation) not in (Union, types.UnionType):
        return (annotation,)
    members = (t for t in get_args(annotation) if t is not type(None))
    return tuple(get_args(t)[0] if get_origin(t) is Annotated else t for t in members)


def _is_list_of_strings(field: FieldInfo) -> bool:
    """A field of type `tuple[str, ...]`; its strings may have bounds."""
    members = _members(field)
    if len(members) != 1 or get_origin(members[0]) is not tuple:
        return False
    item = get_args(members[0])[0]
    return item is str or (get_origin(item) is Annotated and get_args(item)[0] is str)


def _metavar(field: FieldInfo) -> str:
    names = []
    for member in _members(field):
        if get_origin(member) is Literal:
            names += [str(choice) for choice in get_args(member)]
        elif get_origin(member) is tuple:
            names.append("TEXT" if _is_list_of_strings(field) else "N,N,...")
        elif get_origin(member) is dict:
            names.append("YAML")
        else:
            names.append({int: "INTEGER", float: "NUMBER"}.get(member, "TEXT"))
    return "|".join(names)


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    shown = field.default is not None and field.default not in ((), "")
    return (
        f"{text} [default: {field.default}]".strip() if shown and not field.is_required() else text
    )
