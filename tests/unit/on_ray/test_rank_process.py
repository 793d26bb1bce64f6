"""A rank's process is changed when its executor prepares it, not where the object is made."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue

import psutil
import pytest
from support.fake_worker import FakeWorker

from saqqara.cluster.on_ray.rank_process import ProcessInfo, RankProcess, end_processes, started_at
from saqqara.cluster.recovery.pulse import BEAT_SECONDS, PulseAddress, PulseMonitor
from saqqara.configs.schema import EngineConfig
from saqqara.workers.mesh.layout import MeshLayout

PREPARE = """
import logging, sys
from saqqara.cluster.on_ray.rank_process import RankProcess

info = RankProcess(3, sys.argv[1]).prepare()
logging.getLogger("anybody").info("says something")
sys.stderr.write("so does stderr\\n")
print(info.pid)
"""


def test_making_a_rank_changes_nothing_of_the_process(tmp_path: Path) -> None:
    before = (list(logging.getLogger().handlers), logging.getLogger().level, os.fstat(2))
    rank = RankProcess(0, str(tmp_path / "logs" / "rank-0.log"), num_threads=3)
    assert rank.num_threads == 3
    after = (list(logging.getLogger().handlers), logging.getLogger().level, os.fstat(2))
    assert after == before
    assert not list(tmp_path.iterdir())


def test_a_prepared_rank_logs_to_its_file(tmp_path: Path) -> None:
    file = tmp_path / "logs" / "rank-3.log"
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, str(file)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 0
    assert done.stderr == ""
    text = file.read_text(encoding="utf-8")
    assert "INFO anybody: says something" in text
    assert "so does stderr" in text


def test_a_process_is_waited_for_until_it_is_gone_and_killed_where_it_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        info = ProcessInfo("here", child.pid, started_at(psutil.Process(child.pid)))
        assert end_processes([info], 0.2) == [child.pid]
        assert not replace(info, started_at=info.started_at - 1).is_there(), "an id is used again"
        boot, created = psutil.boot_time(), psutil.Process(child.pid).create_time()
        with monkeypatch.context() as clock_set:  # both are told by the clock of now
            clock_set.setattr(psutil, "boot_time", lambda: boot + 5)
            clock_set.setattr(psutil.Process, "create_time", lambda _: created + 5)
            assert info.is_there()
        child.send_signal(signal.SIGSTOP)
        assert end_processes([info], 20) == [], "it holds nothing, though nobody has asked for it"
    finally:
        child.kill()
        child.communicate()
    assert not info.is_there()


def serve_rank(address: PulseAddress, log_file: str) -> None:
    """A rank's process, without Ray."""
    rank = RankProcess(0, log_file, num_threads=1)
    rank.prepare(address)
    config = EngineConfig(model="-", executor="ray", device="cpu")
    rank.start(config, MeshLayout(1, 1), None, "127.0.0.1", FakeWorker)
    threading.Event().wait(60)


def test_a_rank_beats_says_that_it_is_up_and_its_death_is_heard(tmp_path: Path) -> None:
    losses: SimpleQueue[tuple[int, bool]] = SimpleQueue()
    monitor = PulseMonitor("127.0.0.1", lambda rank, is_closed: losses.put((rank, is_closed)))
    log_file = tmp_path / "rank-0.log"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve_rank, args=(monitor.address, str(log_file)))
    process.start()
    try:
        deadline = time.monotonic() + 60
        while not [peer for peer in list(monitor._peers.values()) if peer.is_up]:
            assert time.monotonic() < deadline, log_file.read_text(encoding="utf-8")
            time.sleep(0.05)
        time.sleep(2 * BEAT_SECONDS)
        assert losses.empty()
        process.kill()
        assert losses.get(timeout=20) == (0, True)
    finally:
        monitor.close()
        process.kill()
        process.join()
