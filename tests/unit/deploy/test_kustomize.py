"""The overlays of deploy/kustomize: what they make, and that pods are asked what they know."""

import copy
import importlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from saqqara.cluster.settings import engine_config, serve_config
from saqqara.compression.retention import Retention

kustomize: Any = importlib.import_module("overlays")
FOLDER: Path = kustomize.FOLDER
NAMES = [folder.name for folder in kustomize.overlays()]
RAY_HEALTH = {"path": "/api/healthz", "port": 52365}


def service(name: str) -> dict[str, Any]:
    document: dict[str, Any]
    [document] = [d for d in kustomize.build(FOLDER / name) if d["kind"] == "RayService"]
    return document


def args(name: str) -> dict[str, Any]:
    [app] = yaml.safe_load(service(name)["spec"]["serveConfigV2"])["applications"]
    found: dict[str, Any] = app["args"]
    return found


def groups(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = service(name)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return found


def container(group: dict[str, Any]) -> dict[str, Any]:
    [found] = group["template"]["spec"]["containers"]
    return dict(found)


def test_there_is_one_for_each_size() -> None:
    assert NAMES == ["70b-tp8-pp2", "cpu-demo", "one-gpu"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_built_here_is_what_kubectl_builds(name: str) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    text = subprocess.run(
        [kubectl, "kustomize", str(FOLDER / name)], capture_output=True, text=True, check=True
    ).stdout

    def by_name(documents: Any) -> dict[tuple[str, str], Any]:
        return {(d["kind"], d["metadata"]["name"]): d for d in documents}

    assert by_name(yaml.safe_load_all(text)) == by_name(kustomize.build(FOLDER / name))


@pytest.mark.parametrize("name", NAMES)
def test_servers_have_room_for_their_engines(name: str) -> None:
    given = args(name)
    settings = {"model": "m", "executor": "ray", **serve_config(given).engine_kwargs}
    engine = engine_config(settings, where="engine_kwargs")
    assert Retention.parse(engine.retention, engine.budget).profile is None  # fits any model
    limits = [container(group)["resources"]["limits"] for group in groups(name)]
    gpus = [int(limit.get("nvidia.com/gpu", 0)) for limit in limits]
    ranks = engine.tensor_parallel_size * engine.pipeline_parallel_size
    assert sum(gpus) == (0 if name == "cpu-demo" else ranks)
    assert (name == "cpu-demo") == container(groups(name)[0])["image"].endswith("-cpu")


@pytest.mark.parametrize("name", NAMES)
def test_pods_are_asked_what_the_server_says_of_itself(name: str) -> None:
    replicas, *shards = map(container, groups(name))
    asked = {kind: replicas[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    assert asked["readiness"]["httpGet"] == {"path": "/health", "port": 8000}
    for kind in ("startup", "liveness"):
        assert asked[kind]["httpGet"] == {"path": "/live", "port": 8000}
    for probe in asked.values():
        assert probe["timeoutSeconds"] > 2  # `/live` says so after two seconds where nothing runs
    # Longer than Serve takes to notice a dead engine (3 x 10 s) and to start another one.
    assert asked["liveness"]["periodSeconds"] * asked["liveness"]["failureThreshold"] >= 600
    assert asked["startup"]["periodSeconds"] * asked["startup"]["failureThreshold"] >= 1800
    for shard in shards:  # no proxy is there
        assert shard["readinessProbe"]["httpGet"] == RAY_HEALTH
        assert shard["livenessProbe"]["httpGet"] == RAY_HEALTH


@pytest.mark.parametrize("name", NAMES)
def test_pods_have_the_time_that_their_replicas_take_to_end(name: str) -> None:
    drain = serve_config(args(name)).deployment_config.graceful_shutdown_timeout_s
    for group in groups(name):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain


def test_clients_of_two_stages_reach_the_first_only() -> None:
    [selector] = [
        d["spec"]["selector"]
        for d in kustomize.build(FOLDER / "70b-tp8-pp2")
        if d["kind"] == "Service"
    ]
    first, second = (g["template"]["metadata"]["labels"] for g in groups("70b-tp8-pp2"))
    assert selector.items() <= first.items()
    assert not selector.items() <= second.items()
    bundles = args("70b-tp8-pp2")["placement_group_config"]["bundles"]
    assert "saqqara_front" in bundles[0]
    for bundle, group in zip(bundles, groups("70b-tp8-pp2"), strict=True):
        own = next(key for key in bundle if key not in ("CPU", "GPU"))
        assert own in group["rayStartParams"]["resources"]


def test_the_demo_fetches_its_model_to_where_the_server_looks() -> None:
    [group] = groups("cpu-demo")
    [fetch] = group["template"]["spec"]["initContainers"]
    assert fetch["command"] == ["saqqara", "fetch-demo-model", "--cache", "/models"]
    [mount] = [m for m in container(group)["volumeMounts"] if m["name"] == "models"]
    assert mount["mountPath"] == fetch["volumeMounts"][0]["mountPath"] == "/models"
    assert args("cpu-demo")["model_loading_config"]["model_source"] == (
        "/models/models/SmolLM2-135M-Instruct"
    )


@pytest.mark.parametrize(
    ("operation", "result"),
    [
        ({"op": "replace", "path": "/a/0", "value": 5}, {"a": [5, 2]}),
        ({"op": "add", "path": "/a/-", "value": 3}, {"a": [1, 2, 3]}),
        ({"op": "add", "path": "/x~1y", "value": 3}, {"a": [1, 2], "x/y": 3}),
        ({"op": "replace", "path": "/b", "value": 5}, None),
        ({"op": "replace", "path": "/a/7", "value": 5}, None),
        ({"op": "remove", "path": "/a", "value": 5}, None),
    ],
)
def test_patches_do_what_they_say_or_fail(operation: dict[str, Any], result: Any) -> None:
    document = copy.deepcopy({"a": [1, 2]})
    if result is None:
        with pytest.raises(ValueError, match=r"does not exist|not known"):
            kustomize.apply(document, operation)
    else:
        kustomize.apply(document, operation)
        assert document == result


def test_what_is_not_known_here_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("namePrefix: x-\n")
    with pytest.raises(ValueError, match="namePrefix"):
        kustomize.build(tmp_path)
