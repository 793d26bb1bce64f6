"""Saqqara and its peers on the same prompts, in turns: time, memory and agreement, side by side.

    python benchmarks/peers.py --workloads W1,W2 --engines saqqara:full,vllm,openvino --rounds 3

Each engine is loaded once, in a process and a virtual environment of its own (docs/peers.md has the
recipes), and warmed up with one prompt before each workload. Then the engines take turns, one
request at a time: the others wait for their next line of input. A peer whose environment is not
there is reported as missing. Decoding is greedy and ignores the end-of-sequence token; the prompts
are different runs of tokens of Python's own documentation.

`foreign CPU` in the result is the share of all cores' time during a call that went to anything but
the engine at work: idle engines that do not sleep, or somebody else on the machine.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.peer_models import NAMES, peer_model
from harness.peer_process import EngineFailedError, EngineProcess, EngineSpec
from harness.peer_report import Sample, plot, summarise, tables

from saqqara.cluster.cli.tables import print_table
from saqqara.configs.json_text import json_text
from saqqara.configs.paths import cache_dir
from saqqara.configs.schema import EngineConfig
from saqqara.evaluation.speed import throughput

RUNNERS = Path(__file__).resolve().parent / "peer_runners"
WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Workload:
    """So many prompts of so many tokens, and so many new tokens for each."""

    name: str
    num_requests: int
    prompt_tokens: int
    new_tokens: int


WORKLOADS = {
    "W1": Workload("W1", 16, 512, 128),
    "W2": Workload("W2", 16, 2048, 128),
    "W3": Workload("W3", 8, 6144, 256),
    "W4": Workload("W4", 32, 1024, 256),
    "race": Workload("race", 48, 1024, 384),  # for a scarce room: see --kv-tokens
}


@dataclass(frozen=True)
class Peer:
    """How a peer is started; its environment's folder bears the name of its recipe.

    `takes_room`: whether it can be told for how many tokens of keys and values it has room.
    """

    environment: str
    runner: str
    arguments: tuple[str, ...] = ()
    takes_room: bool = False


PEERS = {
    "vllm": Peer("vllm", "run_vllm.py", takes_room=True),
    "openvino": Peer("openvino", "run_openvino.py", takes_room=True),
    "openvino-u8": Peer("openvino", "run_openvino.py", ("--kv-precision", "u8"), takes_room=True),
    "openvino-evict25": Peer(
        "openvino", "run_openvino.py", ("--kept-share", "0.25"), takes_room=True
    ),
    "transformers": Peer("transformers", "run_transformers.py"),
    "transformers-cb": Peer("transformers", "run_transformers.py", ("--continuous",)),
    "deepspeed": Peer("deepspeed", "run_deepspeed.py"),
    "kvpress-pyramidkv25": Peer("kvpress", "run_kvpress.py", ("--kept-share", "0.25")),
}
OURS = ("saqqara:full", "saqqara:pyramidkv@25%", "saqqara:snapkv@25%")
FAST = (*OURS, "vllm", "openvino", "openvino-evict25")


def positive(text: str) -> int:
    """A number of the command line that counts something."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def parse_workloads(text: str) -> list[Workload]:
    """Workloads from names, or from `REQUESTSxPROMPT+NEW` such as `2x64+8`, with commas between.

    Raises:
        ValueError: a part is neither.
    """
    found = []
    for part in text.split(","):
        if match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)\+([1-9]\d*)", part):
            found.append(Workload(part, *map(int, match.groups())))
        elif part in WORKLOADS:
            found.append(WORKLOADS[part])
        else:
            known = ", ".join(WORKLOADS)
            raise ValueError(f"workloads: {part!r} is not one of {known}, nor such as 2x64+8")
    if len({workload.name for workload in found}) < len(found):
        raise ValueError(f"workloads: {text!r} names one twice")
    return found


def parse_settings(name: str) -> dict[str, Any]:
    """Keyword arguments of `LLM` from `saqqara:METHOD[@BUDGET][/FIELD=VALUE...]`.

    `decode` is no field of it, but the decode stage of the retention.

    Raises:
        ValueError: it is not of that form.
    """
    match = re.fullmatch(r"saqqara:([\w-]+)(?:@(\d+%?))?((?:/\w+=[^/]+)*)", name)
    if match is None:
        raise ValueError(
            f"engines: {name!r} should read saqqara:METHOD[@BUDGET][/FIELD=VALUE...], such as "
            "saqqara:pyramidkv@25%/max_num_seqs=16"
        )
    method, budget, fields = match.groups()
    settings: dict[str, Any] = {"retention": method}
    if budget is not None:
        settings["budget"] = budget if budget.endswith("%") else int(budget)
    for pair in fields.split("/")[1:]:
        key, _, value = pair.partition("=")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    if "decode" in settings:
        of_retention = {"method": method} | {k: settings.pop(k) for k in ("budget", "decode")}
        settings["retention"] = of_retention
    return settings


def with_options(peer: Peer, pairs: Sequence[str]) -> Peer:
    """A peer whose runner gets options more, from `OPTION=VALUE`.

    Raises:
        ValueError: a pair is not of that form.
    """
    more = []
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not option or not equals:
            raise ValueError(f"engines: {pair!r} should read OPTION=VALUE, an option of the runner")
        more += [f"--{option}", value]
    return replace(peer, arguments=(*peer.arguments, *more))


def parse_engines(
    text: str, peers_dir: Path, model: str, threads: int, kv_tokens: int | None = None
) -> list[EngineSpec]:
    """The engines of a command line, with the commands that run them.

    With `kv_tokens` each has room for the full keys and values of so many tokens.

    Raises:
        ValueError: a name is unknown or comes twice.
    """
    names = text.split(",")
    if len(set(names)) < len(names):
        raise ValueError(f"engines: {text!r} names one twice")
    return [_engine(name, peers_dir, model, threads, kv_tokens) for name in names]


def _engine(
    name: str, peers_dir: Path, model: str, threads: int, kv_tokens: int | None
) -> EngineSpec:
    if name.startswith("saqqara:"):
        more = ("--settings", json.dumps(parse_settings(name)))
        peer = Peer("saqqara", "run_saqqara.py", more, takes_room=True)
        python = Path(sys.executable)
    elif (parts := name.split("/"))[0] in PEERS:
        peer = with_options(PEERS[parts[0]], parts[1:])
        python = peers_dir / peer.environment / "bin" / "python"
        if not python.exists():
            return EngineSpec(name, None, f"no {python}: see {peer.environment!r} in docs/peers.md")
    else:
        known = ", ".join(["saqqara:METHOD[@BUDGET]", *PEERS])
        raise ValueError(f"engines: {name!r} is not one of {known}")
    if kv_tokens is not None and not peer.takes_room:
        return EngineSpec(name, None, "it takes no room in tokens (--kv-tokens)")
    options = {"--model": model, "--threads": str(threads)}
    if kv_tokens is not None:
        options["--kv-tokens"] = str(kv_tokens)
    options["--cache"] = str(peers_dir / peer.environment / "models")
    pairs = [part for pair in options.items() for part in pair]
    return EngineSpec(name, (str(python), str(RUNNERS / peer.runner), *pairs, *peer.arguments))


@dataclass
class Run:
    """The engines that are up, and what has been measured so far."""

    model: str
    folder: Path
    timeout_seconds: float
    engines: dict[str, EngineProcess] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)

    @contextmanager
    def start(self, specs: Sequence[EngineSpec]) -> Iterator[None]:
        """Load the engines one after the other; stop them at the end."""
        with ExitStack() as stack:
            for spec in specs:
                if spec.missing is not None:
                    self.fail(spec.name, f"missing: {spec.missing}")
                    continue
                log = self.folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', spec.name)}.log"
                say(f"loading {spec.name}")
                try:
                    engine = EngineProcess(spec, log, self.timeout_seconds)
                    self.engines[spec.name] = stack.enter_context(engine)
                except EngineFailedError as error:
                    self.fail(spec.name, f"failed to load: {error}")
            yield

    def fail(self, name: str, reason: str) -> None:
        """Go on without an engine."""
        say(f"{name} {reason}")
        self.failures[name] = reason
        if name in self.engines:
            self.engines[name].stop()  # gives its memory back

    def measure(self, workload: Workload, rounds: int, slow_rounds: int, slow: float) -> None:
        """Warm the engines up and let them take turns; another one is first in each round."""
        prompts = make_prompts(self.model, workload)
        for name in list(self.engines):
            say(f"{workload.name}: warming up {name}")
            self.call(name, workload, prompts[:1], None)
        for number in range(rounds):
            names = [name for name in self.engines if name not in self.failures]
            first = number % max(len(names), 1)
            for name in names[first:] + names[:first]:
                last = [s.wall_seconds for s in self.samples if s.at == (workload.name, name)]
                if number >= slow_rounds and last and max(last) > slow:
                    continue
                self.call(name, workload, prompts, number)

    def call(
        self, name: str, workload: Workload, prompts: list[list[int]], number: int | None
    ) -> None:
        """One request; a sample unless it is a warm-up (no round's number)."""
        if name in self.failures:
            return
        new_tokens = WARM_UP_TOKENS if number is None else workload.new_tokens
        try:
            reply = self.engines[name].request(prompts, new_tokens)
        except EngineFailedError as error:
            self.fail(name, f"failed in {workload.name}: {error}")
            return
        if number is not None:
            sample = Sample(workload.name, name, number, **reply)
            self.samples.append(sample)
            say(f"{workload.name} round {number + 1}: {name}: {sample}")

    def result(self, workloads: Sequence[Workload], given: argparse.Namespace) -> dict[str, Any]:
        """All that is known, for JSON."""
        return {
            "settings": {
                "model": self.model,
                "threads": given.threads,
                "rounds": given.rounds,
                "slow_rounds": given.slow_rounds,
                "kv_tokens": given.kv_tokens,
                "cores": os.cpu_count(),
            },
            "engines": {name: engine.started for name, engine in self.engines.items()},
            "failures": self.failures,
            "workloads": {workload.name: asdict(workload) for workload in workloads},
            "results": summarise(self.samples),
        }


def make_prompts(model: str, workload: Workload) -> list[list[int]]:
    """Different runs of tokens of Python's documentation."""
    made = throughput.Workload(
        num_requests=workload.num_requests,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        text=True,
    )
    return made.token_ids(EngineConfig(model=model))


def say(text: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=NAMES[0],
        help=f"local folder, or {', '.join(NAMES)}; default: {NAMES[0]}",
    )
    parser.add_argument(
        "--workloads", default="W1,W2,W3,W4", help="names (race, too), or such as 2x64+8"
    )
    parser.add_argument(
        "--engines",
        default=",".join(FAST),
        help="with commas between: saqqara:METHOD[@BUDGET][/FIELD=VALUE...], or a peer, which may "
        "have options of its runner: PEER[/OPTION=VALUE...]; peers: " + ", ".join(PEERS),
    )
    parser.add_argument(
        "--kv-tokens",
        type=positive,
        help="give every engine room for the full keys and values of so many tokens, such as 5632 "
        "for four sequences of the race; default: each engine's own",
    )
    parser.add_argument("--rounds", type=int, default=3, help="calls of each engine per workload")
    parser.add_argument("--slow-rounds", type=int, help="of slow engines; default: as the others")
    parser.add_argument("--slow-seconds", type=float, default=100.0, help="a slow call takes more")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each engine")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one call")
    parser.add_argument("--peers-dir", type=Path, help="environments; default: <cache>/peers")
    parser.add_argument("--logs", type=Path, default=Path("results/peers"), help="engines' logs")
    parser.add_argument("--json", type=Path, help="write all figures here, after each workload")
    parser.add_argument("--plot", type=Path, help="write a picture (PNG) here")
    return parser


def main() -> int:
    """Measure and report; 0 when every engine that is there has answered."""
    parser = arguments()
    given = parser.parse_args()
    model = peer_model(given.model, say)
    peers_dir = (given.peers_dir or cache_dir() / "peers").absolute()
    try:
        workloads = parse_workloads(given.workloads)
        specs = parse_engines(given.engines, peers_dir, model, given.threads, given.kv_tokens)
    except ValueError as error:
        parser.error(str(error))
    run = Run(model, given.logs, given.timeout)
    slow_rounds = given.rounds if given.slow_rounds is None else given.slow_rounds
    with run.start(specs):
        for workload in workloads:
            run.measure(workload, given.rounds, slow_rounds, given.slow_seconds)
            if given.json is not None:
                given.json.parent.mkdir(parents=True, exist_ok=True)
                text = json_text(run.result(workloads, given), indent=1) + "\n"
                given.json.write_text(text, encoding="utf-8")
    result = run.result(workloads, given)
    if given.plot is not None:
        given.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(given.plot, result)
    for table in tables(result):
        print_table(table)
    for name, reason in run.failures.items():
        print(f"{name}: {reason}")
    return 1 if any(not reason.startswith("missing") for reason in run.failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
