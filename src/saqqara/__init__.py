"""Saqqara: an inference engine for large language models with pyramid KV retention, on Ray.

The public names are imported when they are first used, so that `import saqqara` loads neither torch
nor Ray.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saqqara.cluster.llm import LLM
    from saqqara.compression.retention import Retention

    from .cluster.sampling import SamplingParams

try:
    __version__ = version("saqqara")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = ["LLM", "Retention", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "saqqara.cluster.llm",
    "Retention": "saqqara.compression.retention",
    "SamplingParams": "saqqara.cluster.sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
