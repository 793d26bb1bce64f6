"""Where the presets lie, and how a YAML file of settings is read."""

from pathlib import Path
from typing import Any

import yaml

CONFIG_DIR = Path(__file__).resolve().parent


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; a bare name such as `cpu-pp2` is looked up under `configs/`.

    Raises:
        ValueError: no such file or preset, or the file is not a mapping.
    """
    file = Path(path)
    if not file.exists():
        matches = sorted(CONFIG_DIR.glob(f"*/{path}.yaml")) + sorted(
            CONFIG_DIR.glob(f"{path}.yaml")
        )
        if not matches:
            known = ", ".join(sorted(p.stem for p in CONFIG_DIR.glob("*/*.yaml")))
            raise ValueError(f"config: no file or preset {str(path)!r}; presets: {known}")
        file = matches[0]
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(
            f"config: {file} must hold a mapping of settings, not {type(data).__name__}"
        )
    return data
