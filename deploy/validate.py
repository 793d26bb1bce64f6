"""Checks every Kubernetes manifest here against its schema; unknown fields are errors.

    .venv/bin/python deploy/validate.py [FILE...]       # default: deploy/kuberay/*.yaml, and
                                                        # every overlay of deploy/kustomize

Kinds of Kubernetes itself are checked with the schemas that come with `kubernetes-validate`, and so
are the pod templates inside other kinds. Custom kinds (RayJob, RayService, RayCluster, PodMonitor)
need their definitions: KUBERAY_CRD_DIR names a folder with CustomResourceDefinition files, such as
`ray-operator/config/crd/bases` of KubeRay. What it lacks is skipped, and said so.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from overlays import FILE, build, overlays

CRD_VARIABLE = "KUBERAY_CRD_DIR"
FOLDER = Path(__file__).parent / "kuberay"

Json = Mapping[str, Any]
Definitions = Mapping[tuple[str, str], dict[str, Any]]  # schemas by (apiVersion, kind)
Location = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a field, such as `spec.containers.0.ports`."""

    path: Location
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path)) or '(top level)'}: {self.message}"


def load_definitions(folder: Path) -> Definitions:
    """The schemas of the CustomResourceDefinitions in a folder's YAML files, made strict.

    Raises:
        ValueError: the folder has none.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(folder.glob("*.yaml")):
        for document in _documents(file):
            if document.get("kind") == "CustomResourceDefinition":
                spec = document["spec"]
                for version in spec["versions"]:
                    key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                    found[key] = strict(version["schema"]["openAPIV3Schema"])
                    # Every object has these, and the API server checks them.
                    found[key]["properties"] |= {
                        name: {"type": "string"} for name in ("apiVersion", "kind")
                    }
    if not found:
        raise ValueError(f"{CRD_VARIABLE}: no CustomResourceDefinition in {folder}/*.yaml")
    return found


def strict(schema: Any) -> Any:
    """A definition's schema as JSON schema, in which unknown fields are errors."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: {name: strict(field) for name, field in value.items()}
        if key == "properties"
        else strict(value)
        for key, value in schema.items()
        if key not in ("description", "default", "format")
    }
    if made.pop("x-kubernetes-int-or-string", False):
        made |= {"type": ["integer", "string"]}
        made.pop("anyOf", None)
    if made.pop("nullable", False) and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    closed = "properties" in made and not made.get("x-kubernetes-preserve-unknown-fields")
    if closed:
        made.setdefault("additionalProperties", False)
    return made


def check(document: Json, definitions: Definitions) -> list[Problem] | None:
    """What is wrong with a manifest; None: there is no schema for its kind.

    The pod templates of a kind without a schema are checked all the same.
    """
    for key in ("apiVersion", "kind", "metadata"):
        if key not in document:
            return [Problem((), f"{key} is missing")]
    schema = definitions.get((document["apiVersion"], document["kind"]))
    problems = _check_builtin(document) if schema is None else list(_check_custom(document, schema))
    for path, template in _pod_templates(document):
        pod = {"apiVersion": "v1", "kind": "Pod"} | dict(template)
        problems_of_pod = _check_builtin(pod)
        assert problems_of_pod is not None, "kubernetes-validate knows pods"
        if problems_of_pod and problems is None:
            problems = []
        for problem in problems_of_pod:
            assert problems is not None
            problems.append(Problem((*path, *problem.path), problem.message))
    return problems


def _check_builtin(document: Json) -> list[Problem] | None:
    version = kubernetes_validate.latest_version()
    try:
        kubernetes_validate.validate(dict(document), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [Problem(tuple(error.absolute_path), error.message)]
    except kubernetes_validate.SchemaNotFoundError:
        return None
    return []


def _check_custom(document: Json, schema: Json) -> Iterator[Problem]:
    for error in Draft202012Validator(schema).iter_errors(document):
        yield Problem(tuple(error.absolute_path), error.message)


def _pod_templates(node: Any, path: Location = ()) -> Iterator[tuple[Location, Json]]:
    """Everything with `spec.containers`, with its path."""
    if isinstance(node, Mapping):
        spec = node.get("spec")
        if path and isinstance(spec, Mapping) and "containers" in spec:
            yield path, node
        for key, value in node.items():
            yield from _pod_templates(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _pod_templates(value, (*path, index))


def _documents(file: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(file.read_text(encoding="utf-8")) if d is not None]


def main(files: Sequence[Path]) -> int:
    """Check files, and folders of overlays, and say what was found; returns the exit status."""
    folder = os.environ.get(CRD_VARIABLE)
    try:
        definitions = load_definitions(Path(folder)) if folder else {}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_problems = num_checked = 0
    skipped: list[str] = []
    for file in files:
        for document in build(file) if file.is_dir() else _documents(file):
            name = f"{document.get('kind')} {document.get('metadata', {}).get('name')}"
            problems = check(document, definitions)
            if problems is None:
                skipped.append(f"{document['kind']} ({document['apiVersion']})")
                continue
            num_checked += 1
            num_problems += len(problems)
            for problem in problems:
                print(f"{file}: {name}: {problem}", file=sys.stderr)
    print(f"{num_checked} manifests checked, {num_problems} problems")
    if skipped:
        why = f"{CRD_VARIABLE} is not set" if not folder else f"{folder} has no definition of them"
        print(f"skipped but for their pod templates, {why}: {', '.join(sorted(set(skipped)))}")
    return 1 if num_problems else 0


if __name__ == "__main__":
    ours = [*sorted(f for f in FOLDER.glob("*.yaml") if f.name != FILE), *overlays()]
    sys.exit(main([Path(f) for f in sys.argv[1:]] or ours))
