"""What the results of a batch job depend on, so that a resumed job cannot mix two kinds of results.

A model is told by its content, never by its path or by times, which differ on another machine:
config, tokenizer and templates by their hash, weights by their fingerprint
(`compression/profiles/fingerprint.py`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saqqara.cluster.presets import with_profile
from saqqara.cluster.sampling import SamplingParams
from saqqara.compression.profiles.fingerprint import DIGEST_CHARACTERS, weights_digest
from saqqara.compression.retention import Retention
from saqqara.configs.reuse import ReuseConfig
from saqqara.configs.schema import EngineConfig
from saqqara.workers.models.source import described_folder, local_folder
from saqqara.workers.plan import WorkerInfo

# Settings that say where and how fast answers come, not what they are. Every other one counts;
# retention and budget count as what they mean together, models as what is in them.
NEUTRAL_SETTINGS = frozenset(
    {
        *("max_num_seqs", "max_prefill_tokens", "prefill_quantum", "max_extend_tokens"),
        *("linear_chunk_tokens", "page_tokens", "kv_memory_gib", "memory_utilization"),
        *("cuda_graphs", "tensor_parallel_size", "pipeline_parallel_size", "layer_split"),
        *("executor", "num_threads", "warmup", "check_integrity", "metrics_port", "log_dir"),
        *ReuseConfig.model_fields,  # what is computed once answers as what is computed twice
        "profile_dir",  # a profile that is found there counts itself
    }
)
_INPUT = ("input_sha256", "input")  # of the one file, and of each of several
_NEVER_MIXED = (*_INPUT, "output_format", "prompt_column")  # where rows are, and their records
_MOST_SHOWN = 5
_RESOLVED = ("model", "tokenizer", "retention", "budget")
_CONTENT = ("*.json", "tokenizer*", "*.model", "*.txt", "*.jinja", "*/*.jinja")


def fingerprint(
    config: EngineConfig, sampling: SamplingParams, input_sha256: str, **written: Any
) -> dict[str, Any]:
    """Everything that is known of a job before its engine runs, as flat JSON values.

    Args:
        config: the engine's settings.
        sampling: sampling of lines without their own.
        input_sha256: the input's hash.
        written: settings of the job that change what it writes.

    Raises:
        ValueError: the model cannot be read.
    """
    found = with_profile(config)  # another profile keeps other tokens
    retention = Retention.parse(found.retention, found.budget)
    settings: dict[str, Any] = {"input_sha256": input_sha256, **written}
    counting = EngineConfig.model_fields.keys() - NEUTRAL_SETTINGS - set(_RESOLVED)
    settings |= {name: getattr(config, name) for name in counting}
    if retention.decode is not None:  # when rows are compacted is counted in pages
        settings["page_tokens"] = config.page_tokens
    settings |= _model("model", config.model, weights=config.load_format != "dummy")
    if config.tokenizer is not None:
        settings |= _model("tokenizer", config.tokenizer, weights=False)
    settings |= {f"retention.{k}": v for k, v in retention.to_dict().items()}
    settings |= {f"sampling.{k}": v for k, v in sampling.model_dump().items()}
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # tuples as they will be read back
    return plain


def resolved_settings(config: EngineConfig, workers: Sequence[WorkerInfo]) -> dict[str, str]:
    """What is known once an engine runs: what `auto` has come to there, and a hub's commits."""
    found = {
        "device": {worker.device.partition(":")[0] for worker in workers},
        "dtype": {worker.dtype for worker in workers},
        "attention_backend": {worker.attention_backend for worker in workers},
        "linear_backend": {worker.linear_backend for worker in workers},
        "commit of the model": _commits(config.model),
        "commit of the tokenizer": _commits(config.tokenizer or config.model),
    }
    return {name: ", ".join(sorted(values)) for name, values in found.items() if values}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that are not what they were, each in words."""
    return [
        _in_words(key, before.get(key), now.get(key))
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]


def shown(changed: Sequence[str]) -> str:
    """Differences as part of a line: the first few of them, and how many more there are."""
    more = len(changed) - _MOST_SHOWN
    return ", ".join(changed[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def never_mixed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences in what results cannot be mixed over: a row would have two records or none.

    Rows are told by their lines, which in another input mean others; and records in another format
    are not found.
    """
    return differences(
        *(
            {k: v for k, v in s.items() if k.partition("/")[0] in _NEVER_MIXED}
            for s in (before, now)
        )
    )


def _in_words(key: str, old: Any, new: Any) -> str:
    if key == "input_sha256":
        return "the input file has changed"
    name, slash, file = key.partition("/")
    if slash:
        return f"{file} of the {name} has changed"
    return f"{key} was {old!r} and is now {new!r}"


def _model(name: str, model: str, weights: bool) -> dict[str, Any]:
    """A model's content as settings: one for each file that is read whole, one for the weights."""
    folder = local_folder(model)
    if folder is None:
        return {name: model}  # its commit is known once an engine has it
    files = {file for pattern in _CONTENT for file in folder.glob(pattern) if file.is_file()}
    try:
        found = {
            f"{name}/{file.relative_to(folder).as_posix()}": _file_hash(file)[:DIGEST_CHARACTERS]
            for file in sorted(files)
        }
        if weights:
            found[f"{name}/weights"] = weights_digest(folder)
    except OSError as error:
        raise ValueError(f"{name}: cannot read {error.filename}: {error.strerror}") from None
    return found


def _commits(model: str) -> set[str]:
    """The commit of a hub model's files; empty for a folder, or where no hub or cache has it."""
    try:
        return set() if local_folder(model) is not None else {described_folder(model).name}
    except ValueError:
        return set()


def _file_hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
