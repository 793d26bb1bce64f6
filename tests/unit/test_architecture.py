"""The walls of the house: what may import what, and how large a room or a file may be.

Each rule (see `support.architecture`) is also shown to fail on a planted example.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from support.architecture import (
    MAX_FILES,
    MAX_LINES,
    House,
    bare_imports,
    circles,
    full_rooms,
    importers,
    long_files,
    room_of,
    silent_rooms,
    unknown_imports,
    upward_imports,
)

import saqqara

ROOT = Path(__file__).resolve().parents[2]


def _below(*rooms: str) -> frozenset[str]:
    return frozenset(rooms)


# What each room may import, from the bottom up; a room is a folder, or a file that is one.
_WORKERS = {
    "workers": _below("compression", "configs"),  # plans, clocks, transfers: words of all below
    "workers/kernels": _below("workers"),
    "workers/native": _below("workers", "configs"),
    "workers/mesh": _below("workers", "workers/native"),
    "workers/kv": _below("workers", "workers/kernels"),
    "workers/attention": _below("workers", "workers/kv", "workers/kernels", "workers/native"),
    "workers/gguf": _below("workers", "configs"),
    "workers/models/reading": _below(),
    "workers/models": _below("workers", "workers/kernels", "workers/mesh", "workers/native")
    | {"workers/models/reading", "workers/gguf", "compression", "configs"},
    "workers/models/counting": _below("workers/mesh", "workers/models"),
    "workers/grammar": _below("workers", "workers/models"),
    "workers/state": _below("workers", "compression", "configs"),
    "workers/reuse": _below("workers", "workers/kv", "workers/state", "compression"),
}
_WORKERS["workers/footprint.py"] = _below(
    "workers", "workers/mesh", "workers/models", "workers/models/counting", "compression"
)
_PART = _below("workers", "workers/attention", "workers/mesh", "workers/models", "configs")
_PART |= {"workers/footprint.py", "compression"}
_WORKERS["workers/part.py"] = _PART
_WORKERS["workers/process.py"] = _below("workers", "workers/part.py", "configs")
_WORKERS["workers/sizing.py"] = _PART | {"workers/part.py", "workers/kernels", "compression"}
_WORKERS["workers/shard.py"] = _below(
    "workers", "workers/kv", "workers/part.py", "workers/sizing.py", "workers/state", "compression"
) | {"workers/reuse"}
_WORKERS["workers/retain"] = frozenset({*_WORKERS, "compression"}) - {"workers/process.py"}
_WORKERS["workers/sampling"] = _below(
    "workers", "workers/grammar", "workers/sizing.py", "workers/state"
)
_WORKERS["workers/device_steps"] = frozenset({*_WORKERS}) - {"workers/process.py"}
_WORKERS["workers/passes"] = frozenset({*_WORKERS, "compression"}) - {"workers/process.py"}
_WORKERS["workers/worker.py"] = frozenset({*_WORKERS, "compression", "configs"})
_BASE = _below("configs", "compression", "cluster", "cluster/chat")
_PRESETS = _BASE | {"workers/models"}
_BASE |= {"cluster/presets.py"}
# The dialect of OpenAI's API, room by room, for those who speak it: server and batch lines.
_OPENAI = _below("cluster/openai", "cluster/openai/requests", "cluster/openai/tools")
_OPENAI |= {"cluster/openai/responses"}
# What says how large a model is and how it is divided: no tensors are made for it.
_MODEL = _below("workers", "workers/models", "workers/models/counting", "workers/mesh")
ROOMS = {
    "configs": _below(),
    "compression": _below("configs"),
    **_WORKERS,
    "cluster/chat": _below("configs"),
    "cluster/structured": _below("workers", "workers/grammar", "configs"),
    # The words that its rooms share.
    "cluster": _below("workers", "compression", "configs", "cluster/chat", "cluster/structured"),
    "cluster/reuse": _BASE | {"workers"},
    "cluster/scheduling": _BASE | {"workers", "cluster/reuse"},
    "cluster/recovery": _BASE | {"workers"},
    "cluster/live": _BASE | {"workers", "cluster/scheduling", "cluster/reuse"},
    "cluster/top": _below("cluster/live"),
    "cluster/engine": _BASE
    | _MODEL
    | {"cluster/scheduling", "cluster/recovery", "cluster/live", "cluster/structured"}
    | {"workers/worker.py"},
    "cluster/planning": _below("cluster/scheduling", "compression", "configs", "workers")
    | {"workers/footprint.py", "workers/mesh", "workers/models", "workers/models/reading"},
    "cluster/simulation": _below("cluster/planning", "cluster/scheduling", "compression")
    | {"configs", "cluster", "cluster/recovery", "workers", "workers/footprint.py", "workers/mesh"},
    "cluster/openai/formats": _BASE,
    "cluster/openai/tools": _BASE | {"cluster/openai/formats"},
    "cluster/openai": _BASE | {"cluster/openai/tools"},
    "cluster/openai/requests": _BASE | {"cluster/openai", "cluster/openai/tools"},
    "cluster/openai/responses": _BASE | _OPENAI,
    "cluster/server/description": _BASE | _OPENAI | {"cluster/live"},
    "cluster/server": _BASE
    | _OPENAI
    | {"cluster/engine", "cluster/live", "cluster/server/description"},
    "cluster/server/routes": _BASE | _OPENAI | {"cluster/server", "cluster/engine"},
    "cluster/server/page": _below("compression"),
    "cluster/batch_store": _BASE | _OPENAI,
    "cluster/server/batches": _BASE
    | _OPENAI
    | {"cluster/server", "cluster/server/routes", "cluster/batch_store"},
    "cluster/server/app.py": _BASE
    | _OPENAI
    | {"cluster/server", "cluster/server/routes", "cluster/server/page"}
    | {"cluster/server/batches", "cluster/batch_store"},
    "cluster/on_ray": _BASE
    | _MODEL
    | {"cluster/server", "cluster/server/app.py", "cluster/batch_store"}
    | {"cluster/engine", "cluster/live", "cluster/recovery"}
    | {"workers/process.py", "workers/worker.py"},
    # The doors: an engine in this process or on Ray, Python's, and an earlier place of Serve's.
    "cluster/presets.py": _PRESETS,
    "cluster/failover.py": _BASE | {"cluster/engine", "cluster/recovery"},
    "cluster/launch.py": _BASE
    | _MODEL
    | {"cluster/failover.py", "cluster/on_ray", "cluster/engine"},
    "cluster/llm.py": _BASE | {"cluster/launch.py", "cluster/engine"},
    "cluster/serve.py": _below("cluster/on_ray"),
    "cluster/batch": _BASE | _MODEL | _OPENAI | {"cluster/launch.py", "cluster/engine"},
    "cluster/batch/parts": _BASE
    | _OPENAI
    | {"cluster/batch", "cluster/launch.py", "cluster/engine", "cluster/on_ray"},
    "cluster/cli": _BASE
    | _MODEL
    | {"workers/gguf", "cluster/batch", "cluster/batch/parts", "cluster/server", "cluster/on_ray"}
    | {"cluster/launch.py", "cluster/engine", "cluster/top"}
    | {"cluster/planning", "cluster/simulation"},
    "src/saqqara": _BASE | {"cluster/llm.py"},  # the public names
    "evaluation/prompts": _below("cluster/engine"),
    "evaluation/figures": _below("evaluation", "workers/models", "compression", "configs"),
    "evaluation/speed": _BASE | {*_WORKERS, "cluster/engine", "evaluation/prompts", "src/saqqara"},
    "evaluation/tasks": _BASE | {"cluster/engine", "evaluation", "evaluation/prompts"},
    "evaluation": _BASE
    | {*_WORKERS, "cluster/cli", "cluster/batch", "cluster/engine", "src/saqqara"}
    | {"evaluation/prompts", "evaluation/figures", "evaluation/speed", "evaluation/tasks"},
    "src/saqqara/cli.py": _below("cluster/cli", "evaluation"),
}
# Bounds and measured heads lie below retention's other words; who may use those may use them.
_FIRST_WORDS = _below("compression/bounds.py", "compression/profiles")
ROOMS = {
    "compression/bounds.py": _below("configs"),
    "compression/profiles": _below("compression/bounds.py", "configs"),
    **{
        room: below | _FIRST_WORDS if "compression" in {room, *below} else below
        for room, below in ROOMS.items()
    },
}
OPENINGS = {"compression": "compression/retention.py"}  # a package of that name is Python's own
FOLDERS = ("configs", "compression", "workers", "cluster", "evaluation")
HOUSE = House(ROOT, FOLDERS)
SOURCES = HOUSE.files
RAY_FOLDER = "cluster/on_ray"
WITHOUT_TENSORS = (
    "cluster/scheduling/",
    "cluster/reuse/",
    "cluster/openai/",
    "cluster/planning/",
    "cluster/simulation/",
)
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


def test_rooms_import_only_what_lies_below_them() -> None:
    assert upward_imports(HOUSE, ROOMS) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(HOUSE) == []


def test_every_import_of_the_package_leads_to_a_file() -> None:
    assert unknown_imports(HOUSE) == []


def test_ray_is_imported_in_one_folder() -> None:
    found = importers(HOUSE, "ray")
    assert found
    assert [file for file in found if not file.startswith(f"{RAY_FOLDER}/")] == []


def test_rooms_without_tensors_import_torch_nowhere() -> None:
    """Not even within a function."""
    found = importers(HOUSE, "torch")
    assert found
    assert [file for file in found if file.startswith(WITHOUT_TENSORS)] == []


@pytest.mark.parametrize("room", WITHOUT_TENSORS)
def test_rooms_without_tensors_load_neither_torch_nor_ray(room: str) -> None:
    """In a process of its own: whatever they import, however deep, is plain Python."""
    modules = [name for name, file in HOUSE.modules.items() if file.startswith(room)]
    assert modules
    assert not {"torch", "ray"} & loaded_by(", ".join(modules))


def test_folders_are_never_imported_bare() -> None:
    assert bare_imports(HOUSE) == []


def test_no_file_is_too_long_to_hold() -> None:
    assert long_files(House(ROOT, (*FOLDERS, "benchmarks", "deploy"))) == []


def test_no_two_test_files_have_one_name() -> None:
    """Pytest imports each as a module of its name, and stops at the second."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_no_room_is_too_full() -> None:
    assert full_rooms(HOUSE) == []


def test_every_package_says_what_it_is_for() -> None:
    assert silent_rooms(HOUSE, OPENINGS) == []


def planted(folder: Path, files: dict[str, str]) -> House:
    """A house with these files."""
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return House(folder, ("low", "high"))


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    late = "def late():\n    from saqqara.high.b import x\n"
    house = planted(tmp_path, {"low/a.py": late, "high/b.py": "from saqqara.low import a\n"})
    rooms = {"low": frozenset[str](), "high": frozenset({"low"})}
    assert upward_imports(house, rooms) == ["low/a.py imports high/b.py: low may not import high"]
    with pytest.raises(ValueError, match=r"high/b\.py is in no room"):
        upward_imports(house, {"low": frozenset()})


def test_a_file_may_be_a_room_of_its_own(tmp_path: Path) -> None:
    files = {"a": "", "door": "from . import a\n", "b": "from .door import x\n"}
    house = planted(tmp_path, {f"low/{name}.py": text for name, text in files.items()})
    rooms = {"low": frozenset[str](), "low/door.py": frozenset({"low"})}
    assert [room_of(file, rooms) for file in house.files] == ["low", "low", "low/door.py"]
    assert upward_imports(house, rooms) == [
        "low/b.py imports low/door.py: low may not import low/door.py"
    ]


def test_a_circle_of_types_is_found(tmp_path: Path) -> None:
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import X\n"
    files = {"low/a.py": "from .b import y\n", "low/b.py": types}
    assert circles(planted(tmp_path, files)) != []
    assert circles(planted(tmp_path / "other", files | {"low/b.py": ""})) == []


def test_an_import_within_a_function_is_found(tmp_path: Path) -> None:
    files = {"low/a.py": "def late():\n    import ray.util\n", "high/b.py": "import raylib\n"}
    assert importers(planted(tmp_path, files), "ray") == ["low/a.py"]


def test_a_module_named_in_a_text_is_an_import(tmp_path: Path) -> None:
    files = {"low/a.py": 'HOME = "saqqara.high.b"\n', "high/b.py": '"""saqqara.low.a"""\n'}
    assert circles(planted(tmp_path, files)) != []


def test_an_import_through_the_package_is_found(tmp_path: Path) -> None:
    root = "from saqqara.high.b import LLM\n__version__ = '1'\n"
    files = {"src/saqqara/__init__.py": root, "high/b.py": "import saqqara.low.a\n"}
    house = planted(tmp_path, files | {"low/a.py": "from saqqara import LLM, __version__\n"})
    assert house.needs["low/a.py"] == {"src/saqqara/__init__.py"}
    assert circles(house) != []
    other = planted(tmp_path / "b", files | {"low/a.py": "from saqqara import __version__\n"})
    assert circles(other) == []


def test_an_import_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    house = planted(tmp_path, {"low/a.py": "import saqqara.gone\nfrom .b import x\n"})
    assert unknown_imports(house) == [
        "low/a.py imports saqqara.gone",
        "low/a.py imports saqqara.low.b.x",
    ]


def test_torch_or_ray_below_a_plain_room_would_be_seen() -> None:
    assert "torch" in loaded_by("saqqara.workers.kv.store")
    assert "ray" in loaded_by("saqqara.cluster.on_ray.placement")


def test_a_bare_import_is_found(tmp_path: Path) -> None:
    files = {"low/a.py": "from high.b import x\n", "high/b.py": "from ..low import a\n"}
    assert bare_imports(planted(tmp_path, files)) == ["low/a.py imports high.b.x"]


def test_a_long_file_is_found(tmp_path: Path) -> None:
    lines = "x = 1\n" * MAX_LINES
    house = planted(tmp_path, {"low/a.py": lines, "low/b.py": lines + "y = 2\n"})
    (tmp_path / "high").mkdir()
    (tmp_path / "high" / "c.cpp").write_text("//\n" * (MAX_LINES + 1), encoding="utf-8")
    assert long_files(house) == [
        f"{name} has {MAX_LINES + 1} lines" for name in ("low/b.py", "high/c.cpp")
    ]


def test_a_full_room_is_found(tmp_path: Path) -> None:
    files = {"low/__init__.py": "", **{f"low/f{i}.py": "" for i in range(MAX_FILES)}}
    assert full_rooms(planted(tmp_path, files)) == []
    assert full_rooms(planted(tmp_path / "other", files | {"low/g.py": ""})) == [
        f"low has {MAX_FILES + 1} files"
    ]


def test_a_silent_room_is_found(tmp_path: Path) -> None:
    files = {"low/__init__.py": "x = 1\n", "high/__init__.py": '"""Acts. Imports `low`."""\n'}
    assert silent_rooms(planted(tmp_path, files), {}) == ["low/__init__.py"]
    house = planted(tmp_path / "other", {"low/first.py": '"""Acts."""\n', "high/b.py": ""})
    assert silent_rooms(house, {"low": "low/first.py"}) == ["high/__init__.py", "low/first.py"]


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
        for package in {
            module.partition(".")[0] for module in HOUSE.imports(source)
        } - ours_or_standard:
            assert COMES_WITH.get(package, package) in declared, f"{source} imports {package}"


def test_importing_everything_loads_no_folder_bare() -> None:
    modules = sorted(HOUSE.modules)
    found = run_python(
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        f"        assert error.name in {OPTIONAL_PACKAGES}, (name, error)\n"
        f"print(*{set(FOLDERS)} & set(sys.modules))\n"
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
    whole_screens = {"cluster/top/screen.py", "benchmarks/top_picture.py"}
    for source in sorted({*SOURCES, *benchmarks} - {"cluster/cli/tables.py"} - whole_screens):
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
