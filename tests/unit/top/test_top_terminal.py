"""`saqqara top` in a real terminal, of a real engine with a metrics port (its workers are fake)."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from support.fake_model import SPEC, Ascii, greedy
from support.fake_replica import FakeReplica, make_workers
from support.http_answers import answering
from support.server import free_port
from support.terminal import ENTER_SCREEN, LEAVE_SCREEN, SHOW_CURSOR, Terminal, on_terminal

from saqqara.cluster.engine.engine import Engine
from saqqara.cluster.engine.tokenizer import Tokenizer
from saqqara.cluster.request import Request
from saqqara.configs.schema import EngineConfig

TOP = [sys.executable, "-m", "saqqara.cli", "top"]


@contextmanager
def engine(port: int) -> Iterator[Engine]:
    """An engine that has answered a prompt, with its metrics at a port."""
    config = EngineConfig(model="fake", executor="ray", retention="pyramidkv", budget=40)
    replica = FakeReplica(make_workers(1000, stages=(2, 2)))
    engine = Engine(config, replica, Tokenizer(Ascii()), SPEC, model_name="fake-model")
    engine.add(Request("a", "a" * 99, greedy(max_tokens=6, ignore_eos=True)))
    while engine.has_unfinished():
        engine.step()
    engine.metrics.start_http_server(port, read_stats=engine.live_stats)
    try:
        yield engine
    finally:
        engine.shutdown()


def see(terminal: Terminal, text: str) -> list[str]:
    return terminal.wait_for(lambda screen: any(text in line for line in screen), text)


def check_restored(terminal: Terminal, settings: list[object]) -> None:
    """The screen and the cursor are those from before, and keys do what they did."""
    assert terminal.output.count(ENTER_SCREEN) == terminal.output.count(LEAVE_SCREEN) == 1
    assert terminal.output.rindex(SHOW_CURSOR) > terminal.output.index(ENTER_SCREEN)
    assert terminal.settings() == settings


def test_an_engine_comes_goes_and_comes_back() -> None:
    port = free_port()
    with on_terminal([*TOP, f"127.0.0.1:{port}", "--interval", "0.2"]) as terminal:
        settings = terminal.settings()
        see(terminal, f"waiting for http://127.0.0.1:{port}")
        with engine(port):
            screen = see(terminal, "fake-model")
            assert any("2 of 2 alive" in line for line in screen)
            assert any("the last prompt" in line for line in screen)
            bars = [line.count("█") for line in screen if line.strip()[:1] in ("3", "2")]
            assert 0 < bars[0] < bars[1], "a pyramid"
            terminal.resize(44, 9)
            small = terminal.wait_for(
                lambda lines: len(lines) <= 9 and any("fake-model" in line for line in lines),
                "smaller screen",
            )
            assert all(len(line) <= 44 for line in small)
            terminal.resize(100, 30)
            see(terminal, "2 of 2 alive")
        see(terminal, "gone for")
        with engine(port):
            terminal.wait_for(
                lambda lines: (
                    any("fake-model" in line for line in lines)
                    and not any("gone for" in line for line in lines)
                ),
                "engine that is back",
            )
        terminal.type("\x03")
        assert terminal.end() == 0
        check_restored(terminal, settings)


def test_a_wrong_key_ends_it_and_says_so() -> None:
    def answer(path: object, headers: object) -> tuple[int, dict[str, str], bytes]:
        return 401, {}, b""

    with (
        answering(answer) as port,
        on_terminal([*TOP, f"127.0.0.1:{port}"], variables={"SAQQARA_API_KEY": "k"}) as terminal,
    ):
        settings = terminal.settings()
        assert terminal.end() == 2
        check_restored(terminal, settings)
        last = terminal.output.rpartition(LEAVE_SCREEN)[2]
        assert "error: http://127.0.0.1" in last
        assert "key is wrong" in last


def test_sigterm_restores_the_terminal() -> None:
    with on_terminal([*TOP, f"127.0.0.1:{free_port()}"]) as terminal:
        settings = terminal.settings()
        see(terminal, "waiting for")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM
        check_restored(terminal, settings)


def run_top(*arguments: str) -> "subprocess.CompletedProcess[str]":
    env = {k: v for k, v in os.environ.items() if not k.startswith("SAQQARA_API_KEY")}
    command = [*TOP, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("flags", [(), ("--once",), ("--once", "--json")], ids=str)
def test_without_a_terminal_it_prints_one_snapshot(flags: tuple[str, ...]) -> None:
    port = free_port()
    with engine(port) as running:
        done = run_top(f"127.0.0.1:{port}", *flags)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout
        if "--json" in flags:
            told = json.loads(done.stdout)
            assert told["pyramid"] == running.live_stats().model_dump(mode="json")["pyramid"]
        else:
            assert done.stdout.startswith("fake-model  ready  pyramidkv@40")
            assert done.stdout.isascii()
    if not flags:
        done = run_top(f"127.0.0.1:{port}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"error: http://127.0.0.1:{port} does not answer: connection refused\n"
        )
