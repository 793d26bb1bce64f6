"""Manifests hold only fields that exist, and ask for what our rules of security allow."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from saqqara.cli import app
from saqqara.cluster.settings import engine_config, serve_config
from saqqara.compression.retention import Retention

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
SCRIPT = DEPLOY / "validate.py"
kustomize: Any = importlib.import_module("overlays")
MANIFESTS = {
    f"{file.stem}/{document['kind']}": document
    for file in sorted((DEPLOY / "kuberay").glob("*.yaml"))
    if file.name != kustomize.FILE
    for document in yaml.safe_load_all(file.read_text())
}
MANIFESTS |= {
    f"{folder.name}/{document['kind']}": document
    for folder in kustomize.overlays()
    for document in kustomize.build(folder)
}
LABEL = "app.kubernetes.io/part-of"

# A definition with everything that `strict` treats in a way of its own.
CRD = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: pets.example.com}
spec:
  group: example.com
  names: {kind: Pet, plural: pets}
  scope: Namespaced
  versions:
    - name: v1
      served: true
      storage: true
      schema:
        openAPIV3Schema:
          type: object
          properties:
            metadata: {type: object}
            spec:
              type: object
              required: [name]
              properties:
                name: {type: string}
                owner: {type: string, nullable: true}
                door:
                  anyOf: [{type: integer}, {type: string}]
                  x-kubernetes-int-or-string: true
                notes: {type: object, additionalProperties: {type: string}}
                extra: {type: object, x-kubernetes-preserve-unknown-fields: true}
                properties:
                  type: array
                  items: {type: object, properties: {size: {type: integer}}}
"""
PET = {
    "apiVersion": "example.com/v1",
    "kind": "Pet",
    "metadata": {"name": "cat"},
    "spec": {
        "name": "Sobek",
        "owner": None,
        "door": 3,
        "notes": {"any": "thing"},
        "extra": {"any": ["thing"]},
        "properties": [{"size": 3}],
    },
}


@pytest.fixture(scope="module")
def validate() -> Any:
    spec = importlib.util.spec_from_file_location("validate_manifests", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def found(nodes: Any, key: str) -> Iterator[Any]:
    """Every value of a key, however deep."""
    if isinstance(nodes, dict):
        if key in nodes:
            yield nodes[key]
        nodes = list(nodes.values())
    if isinstance(nodes, list):
        for node in nodes:
            yield from found(node, key)


def pod_templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [*found(document, "template"), *found(document, "submitterPodTemplate")]


def test_every_manifest_is_valid() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ", 0 problems" in done.stdout
    if not os.environ.get("KUBERAY_CRD_DIR"):
        skipped = done.stdout.splitlines()[-1]
        assert skipped.startswith("skipped but for their pod templates, KUBERAY_CRD_DIR is not set")
        for kind in ("RayCluster", "RayJob", "RayService", "PodMonitor"):
            assert kind in skipped


def test_an_unknown_field_is_an_error_that_names_its_path(
    validate: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = next(d for d in MANIFESTS.values() if d["kind"] == "NetworkPolicy")
    wrong = policy | {"spec": policy["spec"] | {"ingres": []}}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    assert validate.main([tmp_path / "wrong.yaml"]) == 1
    told = capsys.readouterr().err
    assert "NetworkPolicy saqqara: spec: " in told
    assert "'ingres' was unexpected" in told


def test_pod_templates_are_checked_without_the_definition_of_their_kind(validate: Any) -> None:
    service = yaml.safe_load(yaml.safe_dump(MANIFESTS["ray-service-70b/RayService"]))
    assert validate.check(service, {}) is None
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    group["template"]["spec"]["containers"][0]["image_pull_policy"] = "Always"
    [problem] = validate.check(service, {})
    path = "spec.rayClusterConfig.workerGroupSpecs.0.template.spec.containers.0"
    assert str(problem).startswith(f"{path}: ")
    assert "'image_pull_policy' was unexpected" in str(problem)


def test_manifests_without_kind_are_wrong(validate: Any) -> None:
    [problem] = validate.check({"apiVersion": "v1", "metadata": {}}, {})
    assert str(problem) == "(top level): kind is missing"


def test_custom_kinds_are_checked_strictly(validate: Any, tmp_path: Path) -> None:
    (tmp_path / "pets.yaml").write_text(CRD)
    definitions = validate.load_definitions(tmp_path)
    assert validate.check(PET, definitions) == []
    for change, path in (
        ({"nam": "x"}, "spec"),
        ({"name": 3}, "spec.name"),
        ({"owner": 3}, "spec.owner"),
        ({"door": 1.5}, "spec.door"),
        ({"notes": {"a": 1}}, "spec.notes.a"),
        ({"properties": [{"siz": 3}]}, "spec.properties.0"),
    ):
        [problem] = validate.check(PET | {"spec": PET["spec"] | change}, definitions)  # type: ignore[operator]
        assert str(problem).startswith(f"{path}: "), problem
    [problem] = validate.check(PET | {"spec": {}}, definitions)
    assert "'name' is a required property" in str(problem)
    [problem] = validate.check(PET | {"spek": {}}, definitions)
    assert str(problem).startswith("(top level): ")


def test_a_folder_without_definitions_is_an_error(
    validate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERAY_CRD_DIR", str(tmp_path))
    assert validate.main([]) == 2


@pytest.mark.parametrize("name", [n for n in MANIFESTS if n.rpartition("/")[2].startswith("Ray")])
def test_pods_run_without_rights_and_with_limits(name: str) -> None:
    templates = pod_templates(MANIFESTS[name])
    assert len(templates) >= 2
    for template in templates:
        assert template["metadata"]["labels"][LABEL] == "saqqara"
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert not container["image"].endswith(":latest")
            if "nvidia.com/gpu" in container["resources"]["limits"]:
                mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
                volumes = {volume["name"]: volume for volume in spec["volumes"]}
                assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"


def test_nothing_is_open_to_the_world() -> None:
    for name, document in MANIFESTS.items():
        assert not {"NodePort", "LoadBalancer"} & set(map(str, found(document, "type"))), name
        assert not list(found(document, "serviceType")), name
        assert not list(found(document, "hostPort")), name
        for cluster in found(document, "headGroupSpec"):
            assert cluster["rayStartParams"]["num-cpus"] == "0"
        if document["kind"].startswith("Ray"):
            assert list(found(document, "authOptions")) == [{"mode": "token"}], name


def serve_args(name: str) -> dict[str, Any]:
    config = yaml.safe_load(MANIFESTS[name]["spec"]["serveConfigV2"])
    [app] = config["applications"]
    assert app["import_path"] == "saqqara.cluster.on_ray.serve:build_app"
    args: dict[str, Any] = app["args"]
    return args


@pytest.mark.parametrize(
    "name",
    [n for n in MANIFESTS if n.endswith("/RayService") and "placement_group" in str(MANIFESTS[n])],
)
def test_services_ask_for_engines_that_their_groups_have_room_for(name: str) -> None:
    args = serve_args(name)
    assert serve_config(args).engine_kwargs == args["engine_kwargs"]
    engine = engine_config(
        {"model": "m", "executor": "ray", **args["engine_kwargs"]}, where="engine_kwargs"
    )
    assert Retention.parse(engine.retention, engine.budget).profile is None  # fits any model
    bundles = args["placement_group_config"]["bundles"]
    assert len(bundles) == engine.pipeline_parallel_size
    groups = MANIFESTS[name]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for bundle, group in zip(bundles, groups, strict=True):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert bundle["GPU"] == engine.tensor_parallel_size == int(limits["nvidia.com/gpu"])
        assert bundle["CPU"] <= int(limits["cpu"])
        own = {key for key in bundle if key not in ("CPU", "GPU")}
        assert own == set(re.findall(r"saqqara_\w+", group["rayStartParams"].get("resources", "")))


def test_pods_with_shards_only_are_ready_without_a_proxy_and_get_no_requests() -> None:
    name = "ray-service-70b-two-nodes/RayService"
    groups = {
        g["groupName"]: g["template"]
        for g in MANIFESTS[name]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    [front], [shards] = (groups[g]["spec"]["containers"] for g in ("front", "shards"))
    assert "readinessProbe" not in front  # KubeRay's asks for the proxy, which is right there
    assert shards["readinessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    selector = MANIFESTS["ray-service-70b-two-nodes/Service"]["spec"]["selector"]
    assert selector.items() <= groups["front"]["metadata"]["labels"].items()
    assert not selector.items() <= groups["shards"]["metadata"]["labels"].items()
    # The first bundle is where the replica is, and so the proxy.
    assert "saqqara_front" in serve_args(name)["placement_group_config"]["bundles"][0]


def test_jobs_run_a_command_that_exists() -> None:
    entrypoint = MANIFESTS["ray-job-batch/RayJob"]["spec"]["entrypoint"].split()
    assert entrypoint[:2] == ["saqqara", "batch"]
    text = CliRunner().invoke(app, ["batch", "--help"], env={"COLUMNS": "200"}).output
    for flag in entrypoint:
        assert not flag.startswith("--") or flag in text, flag


# Docker -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images_copy_what_the_package_is_made_of(name: str) -> None:
    text = (DEPLOY / "docker" / name).read_text()
    copied = {w for line in re.findall(r"^COPY (?!--)(.+) \S+$", text, re.M) for w in line.split()}
    assert all((ROOT / path).exists() for path in copied)
    linked = {p.name for p in (ROOT / "src" / "saqqara").iterdir() if p.is_symlink()}
    assert linked | {"src", "pyproject.toml", "constraints.txt"} <= copied
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert copied <= set(allowed)
    assert "USER 1000:1000" in text.rpartition("FROM ")[2]
    assert "HEALTHCHECK" in text
    environment = dict(re.findall(r"(RAY_SERVE_\w+)=(\S+)", text))
    source = (ROOT / "cluster" / "on_ray" / "serve_run.py").read_text()
    assert environment == dict(re.findall(r'"(RAY_SERVE_\w+)": "(\d)"[,}]', source))
    for argument in re.findall(r"^ARG (?:PYTHON_IMAGE|CUDA)=(.+)$", text, re.M):
        assert re.search(r"\d+\.\d+\.\d+", argument), "a pinned base"


def test_the_compose_file_mounts_what_is_there_and_binds_to_loopback() -> None:
    folder = DEPLOY / "docker"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert set(services) == {"engine", "prometheus", "grafana"}
    mounted = set()
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert re.search(r":v?\d+\.\d+\.\d+", service["image"])
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:")
            assert ":8265" not in port
        for volume in service["volumes"]:
            if volume.startswith("."):
                source = (folder / volume.partition(":")[0]).resolve()
                assert source.exists()
                mounted.add(source)
    assert mounted >= {file.resolve() for file in (DEPLOY / "grafana").glob("*.json")}
    build = services["engine"]["build"]
    assert (folder / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).exists()
    scrape = yaml.safe_load((folder / "prometheus.yaml").read_text())["scrape_configs"]
    assert scrape[0]["static_configs"] == [{"targets": ["engine:8000"]}]
    source = DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml"
    [datasource] = yaml.safe_load(source.read_text())["datasources"]
    assert datasource["url"] == "http://prometheus:9090"
