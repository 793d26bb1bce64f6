"""What may import what. The rules keep Ray at the edge and the parts usable on their own.

`cluster` (decides) -> `workers` (compute) -> `compression` (what to keep), all -> `configs`.
`evaluation` measures all of them; only the command line imports it.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import saqqara

ROOT = Path(__file__).resolve().parents[2]

MAY_IMPORT = {
    "configs": set(),
    "compression": {"configs"},
    "workers": {"compression", "configs"},
    "cluster": {"workers", "compression", "configs"},
    "evaluation": {"cluster", "workers", "compression", "configs"},
}
RAY_FOLDER = "cluster/on_ray/"
NO_TENSORS_FOLDER = "cluster/scheduling/"
OPTIONAL_PACKAGES = {"flash_attn", "triton", "lm_eval"}
# What comes with a package that is declared, by that package; the table of CONTRIBUTING.md says so.
COMES_WITH = {
    "tokenizers": "transformers",
    "huggingface_hub": "transformers",
    "jinja2": "transformers",
    "fastapi": "ray",
    "starlette": "ray",
    "uvicorn": "ray",
    "triton": "torch",
    "pydantic_core": "pydantic",
}

SOURCES = sorted(
    file.relative_to(ROOT).as_posix()
    for folder in MAY_IMPORT
    for file in ROOT.glob(f"{folder}/**/*.py")
)


def imports(source: str) -> Iterator[str]:
    """Full names of the modules a file imports, wherever in it, relative ones resolved."""
    package = ("saqqara", *Path(source).parent.parts)
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def run_python(code: str) -> str:
    """Run code in a fresh interpreter in the repository root, where bare names could be found."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(module: str) -> set[str]:
    """Top-level packages that `import module` loads; it may be several, with commas."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(run_python(code).split())


@pytest.mark.parametrize("source", SOURCES)
def test_dependencies_run_one_way(source: str) -> None:
    folder = source.partition("/")[0]
    for module in imports(source):
        top, _, rest = module.partition(".")
        target = rest.partition(".")[0]
        if top == "saqqara" and target in MAY_IMPORT:
            assert target in {folder} | MAY_IMPORT[folder], f"{source} imports {module}"


@pytest.mark.parametrize("source", [s for s in SOURCES if not s.startswith(RAY_FOLDER)])
def test_ray_is_imported_at_the_edge_only(source: str) -> None:
    assert "ray" not in {module.partition(".")[0] for module in imports(source)}


@pytest.mark.parametrize("source", [s for s in SOURCES if s.startswith(NO_TENSORS_FOLDER)])
def test_the_scheduler_is_plain_python(source: str) -> None:
    assert "torch" not in {module.partition(".")[0] for module in imports(source)}


@pytest.mark.parametrize("source", SOURCES)
def test_folders_are_never_imported_bare(source: str) -> None:
    assert not set(MAY_IMPORT) & {module.partition(".")[0] for module in imports(source)}


def declared_packages() -> set[str]:
    """Import names of what pyproject.toml declares for users: all but the tools for development."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {**project["optional-dependencies"], "dev": []}
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    names = {re.split(r"\W", line.replace("-", "_"), maxsplit=1)[0] for line in lines}
    return {"yaml" if name == "pyyaml" else name for name in names}


def test_what_is_imported_is_declared() -> None:
    declared = declared_packages()
    ours_or_standard = {"saqqara", "__future__", *sys.stdlib_module_names}
    for source in SOURCES:
        for package in {module.partition(".")[0] for module in imports(source)} - ours_or_standard:
            assert COMES_WITH.get(package, package) in declared, f"{source} imports {package}"


def test_importing_everything_loads_no_folder_bare() -> None:
    modules = [
        ".".join(("saqqara", *Path(source).with_suffix("").parts)).removesuffix(".__init__")
        for source in SOURCES
    ]
    found = run_python(
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        f"        assert error.name in {OPTIONAL_PACKAGES}, (name, error)\n"
        f"print(*{set(MAY_IMPORT)} & set(sys.modules))\n"
    )
    assert found.split() == []


def test_the_engine_loads_without_ray() -> None:
    assert "ray" not in loaded_by("saqqara.workers.worker, saqqara.cluster.engine.engine")


def test_import_saqqara_is_light() -> None:
    assert not {"ray", "torch", "transformers", "numpy"} & loaded_by("saqqara")


def test_the_command_line_answers_without_loading_the_engine() -> None:
    """`--version`, `--help`, `methods` and mistakes in flags take no seconds."""
    assert not {"ray", "torch", "transformers", "matplotlib"} & loaded_by(
        "saqqara.cli, saqqara.cluster.cli.methods, saqqara.compression.methods"
    )


def test_tables_are_printed_by_the_function_that_keeps_their_columns() -> None:
    """Other consoles are for progress, on stderr: rich itself drops columns that do not fit."""
    benchmarks = (file.relative_to(ROOT).as_posix() for file in ROOT.glob("benchmarks/**/*.py"))
    for source in sorted({*SOURCES, *benchmarks} - {"cluster/cli/tables.py"}):
        for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Console"):
                assert ast.unparse(node) == "Console(stderr=True)", f"{source}: use print_table"


def test_the_public_names_are_what_there_is() -> None:
    assert sorted(saqqara.__all__) == ["LLM", "Retention", "SamplingParams", "__version__"]
    assert set(saqqara.__all__) <= set(dir(saqqara))
    for name in saqqara.__all__:
        assert getattr(saqqara, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        saqqara.Engine  # noqa: B018
