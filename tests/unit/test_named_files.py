"""Every file and folder of the project that the documents name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = "benchmarks|cluster|compression|configs|deploy|docs|evaluation|src|tests|workers"
NAMED = re.compile(rf"(?<![\w/.-])((?:{FOLDERS})/[\w./-]*\w/?)(?![\w*<{{])")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def missing(text: str, root: Path) -> list[str]:
    """Paths in a text that lead nowhere, in its order."""
    return [path for path in NAMED.findall(text) if not (root / path).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_named_files_exist(document: Path) -> None:
    assert missing(document.read_text(encoding="utf-8"), ROOT) == []


def test_the_three_routes_of_a_request_are_told() -> None:
    """Python, HTTP and batch, file by file."""
    told = (ROOT / "README.md").read_text(encoding="utf-8").partition("## How it works")[2]
    told = told.partition("\n## ")[0]
    files = [path for path in NAMED.findall(told) if path.endswith(".py")]
    assert len(files) > 20
    for door in ("cluster/llm.py", "cluster/server/app.py", "cluster/batch/job.py"):
        assert door in files


def test_a_file_that_is_gone_is_found(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster" / "here.py").touch()
    text = "`cluster/here.py`, `cluster/gone.py` and https://x.org/docs/elsewhere.html in cluster/."
    assert missing(text, tmp_path) == ["cluster/gone.py"]
