"""What Ray Serve is asked for: presets that it takes itself, and the room for each replica."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from saqqara.cluster.settings import read_serve_file, serve_config, served_engine
from saqqara.compression.retention import Retention
from saqqara.compression.scores import SnapKV
from saqqara.configs.yaml_files import CONFIG_DIR

# Importing Ray Serve (2.60) warns of its own use of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

PRESETS = sorted(path.stem for path in (CONFIG_DIR / "serve").glob("*.yaml"))


def test_there_are_presets() -> None:
    assert "one-replica" in PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_serve_config_files(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    file = read_serve_file(name)
    engine = served_engine(serve_config(file.args))
    # One that fits any model: `recommended` brings a profile of one.
    assert Retention.parse(engine.retention, engine.budget).profile is None
    assert (file.http["host"], file.name, file.route_prefix) == ("127.0.0.1", "saqqara", "/")
    content = yaml.safe_load((CONFIG_DIR / "serve" / f"{name}.yaml").read_text())
    assert content["applications"][0]["import_path"] == "saqqara.cluster.on_ray.serve:build_app"
    ServeDeploySchema.model_validate(content)


def test_the_file_of_the_documentation_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    [block] = re.findall(r"```yaml\n(http_options.*?)```", text, re.DOTALL)
    content = yaml.safe_load(block)
    ServeDeploySchema.model_validate(content)
    [application] = content["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    engine = served_engine(serve_config(application["args"]))
    assert engine.pipeline_parallel_size == 2
    assert isinstance(Retention.parse(engine.retention, engine.budget).score, SnapKV)


def server(engine: dict[str, Any], **settings: Any) -> dict[str, Any]:
    loading = {"model_id": "tiny", "model_source": "/models/tiny"}
    kwargs = {"device": "cpu", **engine}
    return {"model_loading_config": loading, "engine_kwargs": kwargs, **settings}


def plan(engine: dict[str, Any], **settings: Any) -> Any:
    from saqqara.cluster.on_ray.serve import plan_replica
    from saqqara.cluster.server.api_keys import ApiKeys

    config = serve_config(server(engine, **settings))
    return plan_replica(config, served_engine(config), ApiKeys())


def test_build_app_makes_an_application_or_names_the_field() -> None:
    from ray.serve import Application

    from saqqara.cluster.on_ray.serve import build_app

    assert isinstance(build_app(server({})), Application)
    with pytest.raises(ValueError, match="unknown key 'max_sequences'"):
        build_app(server({"max_sequences": 1}))
    with pytest.raises(ValueError, match="unknown 'magic'"):
        build_app(server({"retention": "magic"}))


@pytest.mark.parametrize(
    ("scaling", "waits"),
    [
        ({"num_replicas": 1}, False),
        ({"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}}, False),
        ({"autoscaling_config": {"min_replicas": 0, "max_replicas": 2}}, True),
    ],
)
def test_requests_wait_for_a_replica_only_where_they_start_it(
    scaling: dict[str, Any], waits: bool
) -> None:
    from saqqara.cluster.on_ray.serve import build_app

    app = build_app(server({}, deployment_config=scaling))
    chosen = app._bound_deployment._deployment_config.request_router_config
    assert chosen.get_request_router_class().__name__ == "LeastLoadedRouter"
    assert chosen.request_router_kwargs == {"waits": waits}


def test_the_router_is_shipped_to_proxies_that_have_no_package() -> None:
    from saqqara.cluster.on_ray.serve import build_app

    config = build_app(server({}))._bound_deployment._deployment_config.request_router_config
    shipped = config.get_serialized_request_router_cls()
    code = (
        "import sys\n"
        "sys.modules['saqqara'] = None  # an import of it is an error\n"
        "from ray import cloudpickle\n"
        f"print(cloudpickle.loads({shipped!r}).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "LeastLoadedRouter\n", done.stderr


def test_the_rule_for_replicas_is_shipped_to_a_controller_that_has_no_package() -> None:
    from saqqara.cluster.on_ray.serve import build_app

    scaling = {"autoscaling_config": {"max_replicas": 3, "target_load": 0.5}}
    app = build_app(server({}, deployment_config=scaling))
    config = app._bound_deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (1, 3)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (30.0, 600.0)
    policy = config.policy
    code = (
        "import sys\n"
        "sys.modules['saqqara'] = None  # an import of it is an error\n"
        "from types import SimpleNamespace\n"
        "from ray import cloudpickle\n"
        f"rule = cloudpickle.loads({policy.get_serialized_policy_def()!r})\n"
        "loads = {'load': {'a': 1.5}}\n"
        "context = SimpleNamespace(aggregated_metrics=loads, target_num_replicas=1)\n"
        f"print(rule(**{policy.policy_kwargs!r})(context))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "(3.0, {})\n", done.stderr


def test_another_rule_may_be_given() -> None:
    from saqqara.cluster.on_ray.serve import build_app

    scaling = {"autoscaling_config": {"max_replicas": 3, "target_ongoing_requests": 7}}
    app = build_app(server({}, deployment_config=scaling))
    config = app._bound_deployment._deployment_config.autoscaling_config
    assert config.target_ongoing_requests == 7
    assert config.policy.is_default_policy_function()


def test_the_old_path_of_build_app_leads_to_the_new_one() -> None:
    from saqqara.cluster.on_ray import serve

    sys.modules.pop("saqqara.cluster.serve", None)
    with pytest.warns(DeprecationWarning, match=r"is now saqqara\.cluster\.on_ray\.serve"):
        old = importlib.import_module("saqqara.cluster.serve")
    assert old.build_app is serve.build_app


def test_one_rank_runs_in_its_replica() -> None:
    one = plan({}, accelerator_type="H100")
    assert one.placement is None
    assert one.actor_options == {"num_cpus": 1, "accelerator_type": "H100"}
    gpu = plan({"device": "cuda"}, deployment_config={"ray_actor_options": {"num_cpus": 4}})
    assert gpu.actor_options == {"num_cpus": 4, "num_gpus": 1}
    with pytest.raises(ValueError, match="placement_group_config: an engine of one rank"):
        plan({}, placement_group_config={"bundles": [{"CPU": 1}]})


def test_the_replica_shares_the_first_bundle_of_its_ranks() -> None:
    two = plan({"pipeline_parallel_size": 2}, accelerator_type="H100")
    assert two.actor_options == {"num_cpus": 1}
    share = two.placement.bundles[1]["CPU"]
    assert two.placement.bundles == (
        {"CPU": 1 + share, "accelerator_type:H100": 0.001},
        {"CPU": share, "accelerator_type:H100": 0.001},
    )


@pytest.mark.parametrize(("count", "places"), [(4, (0, 1, 2, 3)), (2, (0, 0, 1, 1))])
def test_own_bundles_are_one_per_rank_or_one_per_stage(count: int, places: tuple[int, ...]) -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    own = plan(sizes, placement_group_config={"bundles": [{"CPU": 2}] * count})
    assert own.placement.bundle_of_rank == places
    assert own.actor_options == {"num_cpus": 0}
    with pytest.raises(ValueError, match=r"placement_group_config\.bundles: there are 3"):
        plan(sizes, placement_group_config={"bundles": [{"CPU": 2}] * 3})
