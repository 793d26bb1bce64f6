"""What `make audit` makes of pip-audit's reports: silence of a service is not a clean bill."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

audit: Any = importlib.import_module("audit")
GOOD = {"name": "good", "version": "1", "vulns": []}
BAD = {
    "name": "bad",
    "version": "2",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"], "description": ""}],
}
UNKNOWN = {"name": "gone", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "status"),
    [
        ([GOOD], audit.CLEAN),
        ([GOOD, BAD], audit.VULNERABLE),
        ([GOOD, UNKNOWN], audit.UNKNOWN),
        ([BAD, UNKNOWN], audit.VULNERABLE),
        ([UNKNOWN], audit.UNKNOWN),
        ([], audit.UNKNOWN),
    ],
)
def test_it_is_clean_only_where_all_were_audited(
    packages: list[dict[str, Any]], status: int
) -> None:
    assert audit.judge({"dependencies": packages, "fixes": []}).status == status


def test_it_says_what_is_wrong_and_what_was_not_audited() -> None:
    many = [{**UNKNOWN, "name": f"gone{i}"} for i in range(9)]
    lines = audit.judge({"dependencies": [GOOD, BAD, *many]}).lines
    assert lines[0] == "bad 2: PYSEC-1 (CVE-1), mended in 3"
    assert lines[1].startswith("9 of 11 packages could not be audited: gone0, gone1")
    assert "gone4 and 4 more" in lines[1]
    assert lines[2] == "2 packages audited, 1 known vulnerabilities"


def test_a_service_out_of_reach_is_said(tmp_path: Path) -> None:
    command = tmp_path / "bin" / "pip-audit"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\necho 'ERROR: no route to host' >&2\nexit 1\n")
    command.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(Path(audit.__file__)), "--environment", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == audit.UNKNOWN
    assert "no route to host" in done.stderr
    assert "--service" in done.stderr
