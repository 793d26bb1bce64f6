"""Looks for known vulnerabilities in what Saqqara is tested with: `make audit`.

    python deploy/audit.py [--environment FOLDER] [--service pypi|osv]

pip-audit, in an environment of its own, asks a vulnerability service about every version in
`constraints.txt`. Ends with 0 if all were asked about and none is known to be vulnerable, 1 if some
are, 2 if it could not be asked about all of them: where the service is out of reach, or a mirror
stands in its place that knows no vulnerabilities, pip-audit alone says that all is well.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PIP_AUDIT = "pip-audit==2.10.1"
SHOWN = 5  # packages that a message names
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the audit says: its exit status, and lines for people."""

    status: int
    lines: tuple[str, ...]


def main() -> int:
    """Audit and say what was found; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environment", type=Path, help="pip-audit's; default: one for this time")
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="whom to ask")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = arguments.environment
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="audit-")))
        try:
            report = audit(install(folder), arguments.service)
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            verdict = Verdict(UNKNOWN, (f"the audit did not run: {error}",))
        else:
            verdict = judge(report)
    for line in verdict.lines:
        print(line, file=sys.stdout if verdict.status == CLEAN else sys.stderr)
    return verdict.status


def install(folder: Path) -> Path:
    """pip-audit's command in an environment, made if it is not there.

    Raises:
        subprocess.CalledProcessError: it could not be installed.
    """
    command = folder / "bin" / "pip-audit"
    if not command.exists():
        python = str(folder / "bin" / "python")
        for step in (
            [sys.executable, "-m", "venv", str(folder)],
            [python, "-m", "pip", "install", "--quiet", PIP_AUDIT],
        ):
            subprocess.run(step, check=True)
    return command


def audit(command: Path, service: str) -> Any:
    """pip-audit's report of `constraints.txt`.

    Raises:
        ValueError: it made none; says what it said instead.
    """
    flags = ["--requirement", str(CONSTRAINTS), "--disable-pip", "--no-deps"]
    flags += ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(
        [str(command), *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        return json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"status {done.returncode}"
        raise ValueError(
            f"the service {service!r} cannot be asked ({reason}); it must be within reach, or try "
            "another one with --service"
        ) from None


def judge(report: Any) -> Verdict:
    """What follows from a report of pip-audit (`--format json`)."""
    packages = report["dependencies"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']}: {vulnerability['id']}"
        f" ({', '.join(vulnerability['aliases']) or 'no other name'}),"
        f" mended in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in packages
        for vulnerability in package.get("vulns", ())
    ]
    lines = list(found)
    num_audited = len(packages) - len(skipped)
    if skipped:
        lines.append(
            f"{len(skipped)} of {len(packages)} packages could not be audited: {_some(skipped)}. "
            "Where that is most of them, the service is out of reach, or a mirror answers for it."
        )
    lines.append(f"{num_audited} packages audited, {len(found)} known vulnerabilities")
    if found:
        return Verdict(VULNERABLE, tuple(lines))
    is_whole = num_audited > 0 and not skipped
    return Verdict(CLEAN if is_whole else UNKNOWN, tuple(lines))


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


if __name__ == "__main__":
    sys.exit(main())
