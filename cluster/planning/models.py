"""Models to plan for: those in `configs/models/`, or any folder; read without transformers."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from saqqara.configs.names import closest
from saqqara.configs.yaml_files import CONFIG_DIR
from saqqara.workers.models.reading.families import FAMILIES
from saqqara.workers.models.source import described_folder, local_folder
from saqqara.workers.models.spec import ModelSpec

MODEL_DIR = CONFIG_DIR / "models"
_NEEDED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings", "rms_norm_eps"),
)


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """Sizes of a model.

    Attributes:
        name: as the user wrote it.
        spec: what its config says.
    """

    name: str
    spec: ModelSpec


def known_models() -> list[str]:
    """Names of the models in `configs/models/`."""
    return sorted(file.stem for file in MODEL_DIR.glob("*.json"))


def model_of(name: str) -> PlannedModel:
    """A known model, or the one in a local folder or of a hub id (whose config is fetched).

    Raises:
        ValueError: no such model, or one that is not supported; names the config's field.
    """
    if name in known_models():
        return _read(name, MODEL_DIR / f"{name}.json")
    if "/" not in name and local_folder(name) is None:
        close = closest(name, known_models())
        hint = f"did you mean {close!r}?" if close else f"known: {', '.join(known_models())}"
        raise ValueError(f"model: {name!r} is not known; {hint}; or give a model's folder")
    return _read(name, described_folder(name) / "config.json")


def _read(name: str, file: Path) -> PlannedModel:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot read the config in {file}: {error}") from None
    except RecursionError:
        raise ValueError(f"model: {file} is nested too deep") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ValueError(f"model: {file} has no model_type")
    if missing := [key for key in _NEEDED if values.get(key) is None]:
        raise ValueError(f"model: {file} lacks {', '.join(missing)}")
    return PlannedModel(name, _spec(values, file))


def _spec(values: dict[str, Any], file: Path) -> ModelSpec:
    """What `load_spec` reads with transformers, which loads torch, from the same file."""
    dtype = values.get("dtype") or values.get("torch_dtype")
    family = FAMILIES.get(values["model_type"])
    defaults = {"hidden_act": "silu", "tie_word_embeddings": False}
    defaults |= family.defaults if family else {}
    try:
        return ModelSpec.from_hf(SimpleNamespace(**{**defaults, **values, "dtype": dtype}))
    except ValueError as error:
        raise ValueError(f"model: {file}: {error}") from None
