"""The old place of `saqqara.cluster.on_ray.serve`, for one release: import it from there."""

from .on_ray.serve import build_app

__all__ = ["build_app"]
