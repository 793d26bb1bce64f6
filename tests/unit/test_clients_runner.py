"""`make clients`: what its runner makes of checks, and that it leaves nothing running."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
from clients.run import CLIENTS, HERE, Client, Outcome, run_client

CHECKS = """
import os
print("ok it is there")
print("FAIL it is right: ValueError: no" if os.environ["WRONG"] == "1" else "ok it is right")
raise SystemExit(int(os.environ["STATUS"]))
"""


def test_every_client_has_its_checks_at_one_version() -> None:
    for client in CLIENTS:
        assert (HERE / client.checks).is_file()
        for requirement in (name for names in client.requirements for name in names):
            assert "==" in requirement or (client.is_node and "@" in requirement)


def test_checks_run_in_an_environment_of_their_own_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "checks_of_test.py").write_text(CHECKS)
    client = Client("mine", str(tmp_path / "checks_of_test.py"), ())
    outcomes = [
        run_client(client, tmp_path / "env", {**os.environ, "WRONG": wrong, "STATUS": status})
        for wrong, status in (("0", "0"), ("1", "1"), ("0", "3"))
    ]
    assert (tmp_path / "env" / "bin" / "python").exists()
    assert [outcome.passed for outcome in outcomes] == [
        ("it is there", "it is right"),
        ("it is there",),
        ("it is there", "it is right"),
    ]
    assert outcomes[1].failed == ("it is right: ValueError: no",)
    assert outcomes[2].error == "its checks ended with status 3"
    assert [outcome.is_good for outcome in outcomes] == [True, False, False]
    assert not Outcome("none").is_good


def test_an_environment_that_cannot_be_made_is_an_outcome(tmp_path: Path) -> None:
    client = Client("gone", "checks.py", (("./no-such-package",),))
    outcome = run_client(client, tmp_path / "env", os.environ)
    assert str(outcome.error).startswith("no environment: ")


def test_what_it_started_ends_with_it() -> None:
    code = (
        "import os; from clients import run\n"
        "run.end_on_signals()\n"
        "with run.started(['sh', '-c', 'sleep 600 & sleep 600'], env=os.environ) as process:\n"
        "    print(process.pid, flush=True)\n"
        "    process.wait()\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}"}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        children = [child, *child.children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    _, left = psutil.wait_procs(children, timeout=10)
    assert left == []
