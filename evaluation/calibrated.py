"""A calibration from its start to a file: into the profile store, or where a user wants it."""

import logging
import time
from pathlib import Path

from saqqara.cluster.presets import calibrated_folder
from saqqara.compression.profiles.fingerprint import weights_digest
from saqqara.compression.profiles.store import ProfileStore, entry_text
from saqqara.configs.schema import EngineConfig

from .calibrate import Calibration

logger = logging.getLogger(__name__)


def calibrate_model(calibration: Calibration, config: EngineConfig, out: Path | None) -> Path:
    """Measure a model, and write its profile; logs how far it is and how long it took.

    Args:
        calibration: what is measured.
        config: of the engine.
        out: file for the profile; None: the profile store, where `recommended` finds it.

    Returns:
        The file.

    Raises:
        ValueError: the model cannot be measured, or has no weights that a store could tell it by.
        OSError: the file cannot be written.
        RuntimeError: the engine failed.
    """
    started = time.monotonic()
    fingerprint = ""
    if config.load_format == "dummy" and out is None:
        raise ValueError("load_format: dummy weights have no place in the store; give --out")
    if config.load_format != "dummy":
        fingerprint = weights_digest(calibrated_folder(config.model))
    store = ProfileStore(config.profile_dir)
    if out is None:
        store.check_writable()
    profile = calibration.run(config, lambda text: logger.info("calibrating: %s", text))
    seconds = time.monotonic() - started
    measured = {
        "model": Path(config.model).name,
        "context_tokens": calibration.context_tokens,
        "num_samples": calibration.num_samples,
        "seconds": round(seconds, 1),
    }
    logger.info("calibrated in %.0f s", seconds)
    if out is None:
        return store.write(fingerprint, profile, measured)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(entry_text(fingerprint, profile, measured), encoding="utf-8")
    return out
