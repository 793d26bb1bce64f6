"""A rank's process is changed when its executor prepares it, not where the object is made."""

import logging
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import psutil

from saqqara.cluster.on_ray.rank_process import ProcessInfo, RankProcess, wait_for_end

PREPARE = """
import logging, sys
from saqqara.cluster.on_ray.rank_process import ProcessInfo, RankProcess, wait_for_end

info = RankProcess(3, sys.argv[1]).prepare()
logging.getLogger("anybody").info("says something")
sys.stderr.write("so does stderr\\n")
print(info.pid, info.num_threads)
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
    pid, num_threads = map(int, done.stdout.split())
    assert pid > 0
    assert num_threads >= 1
    assert done.stderr == ""
    text = file.read_text(encoding="utf-8")
    assert "INFO anybody: says something" in text
    assert "so does stderr" in text


def test_a_killed_process_is_waited_for_until_it_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        info = ProcessInfo("here", child.pid, 1, psutil.Process(child.pid).create_time())
        assert wait_for_end([info], 0.2) == [child.pid]
        assert not replace(info, started_at=info.started_at - 1).is_there(), "an id is used again"
        threading.Timer(0.2, child.kill).start()
        assert wait_for_end([info], 20) == [], "it holds nothing, though nobody has asked for it"
    finally:
        child.kill()
        child.communicate()
    assert not info.is_there()
