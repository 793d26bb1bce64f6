"""The old place of `saqqara.cluster.on_ray.serve`, for one release: import it from there."""

import warnings

from .on_ray.serve import build_app

warnings.warn(
    "saqqara.cluster.serve is now saqqara.cluster.on_ray.serve; the old name goes next release",
    DeprecationWarning,
    stacklevel=2,
)

__all__ = ["build_app"]
