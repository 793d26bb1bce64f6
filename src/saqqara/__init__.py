"""Saqqara: an inference engine for large language models with pyramid KV retention, on Ray.

The public names are imported when they are first used, so that `import saqqara` loads neither torch
nor Ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saqqara.cluster.llm import LLM
    from saqqara.compression.retention import Retention

    from .cluster.sampling import SamplingParams

    __version__: str

__all__ = ["LLM", "Retention", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "saqqara.cluster.llm",
    "Retention": "saqqara.compression.retention",
    "SamplingParams": "saqqara.cluster.sampling",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        globals()[name] = _version()
        return globals()[name]
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def _version() -> str:
    """Of the installed package; looking takes a while, so it is done when somebody asks."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("saqqara")
    except PackageNotFoundError:  # a checkout on the path, not installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
