"""Presets of servers are files that Ray Serve itself takes."""

import pytest
import yaml

from saqqara.cluster.settings import read_serve_file, serve_config, served_engine
from saqqara.configs.schema import CONFIG_DIR

PRESETS = sorted(path.stem for path in (CONFIG_DIR / "serve").glob("*.yaml"))


def test_there_are_presets() -> None:
    assert "one-replica" in PRESETS


# Importing Ray Serve (2.60) warns of its own use of pydantic.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_serve_config_files(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    args, http = read_serve_file(name)
    served_engine(serve_config(args))
    assert http["host"] == "127.0.0.1"
    content = yaml.safe_load((CONFIG_DIR / "serve" / f"{name}.yaml").read_text())
    assert content["applications"][0]["import_path"] == "saqqara.cluster.serve:build_app"
    ServeDeploySchema.model_validate(content)
