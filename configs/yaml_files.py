"""Where the presets lie, and how a YAML file of settings is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .names import did_you_mean

CONFIG_DIR = Path(__file__).resolve().parent
_MAX_VALUES = 1_000_000  # of a file, with every alias (`*name`) in full


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML's own would drop the first in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """See `SafeLoader`; the values of `<<` are not there yet, which keys may replace."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r:.80} is there twice", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


def parse_yaml(text: str) -> Any:
    """The value of a text in YAML or JSON.

    Raises:
        ValueError: it is neither, nested without end, or has a key twice; says where.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"no YAML or JSON: {problem}") from None
    except RecursionError:
        raise ValueError("no YAML or JSON: nested too deep") from None


def load_yaml(path: str | Path, field: str = "config") -> dict[str, Any]:
    """Read a YAML mapping; a bare name such as `cpu-pp2` is looked up under `configs/`.

    Args:
        path: file or name.
        field: what errors call it.

    Raises:
        ValueError: no such file or preset, or the file is not a mapping.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        kind = "model's folder; give it as --model" if (file / "config.json").exists() else "folder"
        raise ValueError(f"{field}: {file} is a {kind}")
    if file.is_symlink() and not file.exists():
        raise ValueError(f"{field}: {file} is a link that leads to no file")
    if not file.exists():
        file = _preset(str(path), field)
    elif not file.is_file():  # a pipe, of which reading never ends
        raise ValueError(f"{field}: {file} is not a file")
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{field}: cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{field}: {file} is no text in UTF-8") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{field}: {file}{_place(error)} is no YAML: {problem}") from None
    except RecursionError:
        raise ValueError(f"{field}: {file} is nested too deep") from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{field}: {file} must hold a mapping of settings, not {type(data).__name__}"
        )
    if _num_values(data, {}) > _MAX_VALUES:
        raise ValueError(f"{field}: {file} has aliases (*name) that never end, or almost")
    return data


def _preset(name: str, field: str) -> Path:
    """The file of a preset, wherever it lies under `configs/`."""
    presets = {file.stem: file for file in sorted(CONFIG_DIR.glob("*/*.yaml"))}
    if name not in presets:
        if "/" in name or name.endswith((".yaml", ".yml")):
            hint = " (a model is given as --model)" if field == "config" else ""
            raise ValueError(f"{field}: there is no file {name!r}{hint}")
        own = {stem for stem, file in presets.items() if file.parent.name != "retention"}
        hint = did_you_mean(name, own)
        raise ValueError(f"{field}: no file or preset {name!r}; {hint}")
    return presets[name]


def _num_values(value: Any, known: dict[int, int]) -> int:
    """How many values there are with every alias in full; `known` has those that were counted."""
    if not isinstance(value, Mapping | list):
        return 1
    if id(value) not in known:
        known[id(value)] = _MAX_VALUES + 1  # what it is if it contains itself
        items = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_num_values(item, known) for item in items)
    return known[id(value)]


def _place(error: yaml.YAMLError) -> str:
    """Where in a file an error is, such as ', line 3'."""
    mark = getattr(error, "problem_mark", None)
    return "" if mark is None else f", line {mark.line + 1}"
