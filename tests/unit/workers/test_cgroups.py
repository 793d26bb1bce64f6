"""A container's limits are those of its control groups, whatever the machine has."""

import os
from pathlib import Path

import pytest
import torch

from saqqara.configs.worker_settings import WorkerSettings
from saqqara.workers import cgroups, host_memory, process
from saqqara.workers.cgroups import MemoryLimit, memory_limits, usable_cores

MIB = 1 << 20
V2 = "30 23 0:26 {inner} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate"
V1 = "3{n} 31 0:3{n} {inner} /sys/fs/cgroup/{name} rw - cgroup cgroup rw,{name}"
GIANT = str(2**63 - 4096)


def machine(root: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A machine's `/proc` and `/sys`, as far as control groups go."""
    texts = {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts}
    texts |= {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n", encoding="utf-8")
    return root


def memory(limit: str, used_mib: int, idle_mib: int = 0, folder: str = "") -> dict[str, str]:
    """The files of a group of version 2."""
    return {
        f"{folder}memory.max": limit,
        f"{folder}memory.current": str(used_mib * MIB),
        f"{folder}memory.stat": f"anon 1\ninactive_file {idle_mib * MIB}\ntotal_no_number x y",
    }


def found(root: Path) -> dict[str, tuple[int, int]]:
    """MiB of each limit, and MiB that are left, by file."""
    base = root / "sys/fs/cgroup"
    return {
        str(limit.file.relative_to(base)): (limit.limit_bytes // MIB, limit.left_bytes // MIB)
        for limit in memory_limits(root)
    }


def test_a_container_of_version_2_sees_its_group_as_the_root(tmp_path: Path) -> None:
    files = memory(str(1000 * MIB), 300, 100) | {"memory.high": "max", "cpu.max": "50000 100000"}
    root = machine(tmp_path, "0::/", V2.format(inner="/"), files)
    assert found(root) == {"memory.max": (1000, 800)}, "file pages that nobody uses are no load"
    assert usable_cores(root) == 1
    (root / "sys/fs/cgroup/memory.high").write_text(str(500 * MIB))
    assert found(root) == {"memory.max": (1000, 800), "memory.high": (500, 300)}


def test_limits_above_hold_too(tmp_path: Path) -> None:
    """As in a systemd slice or a pod of several containers."""
    files = {
        **memory("max", 300, 0, "a.slice/b c/"),
        **memory(str(400 * MIB), 700, 100, "a.slice/"),
        "a.slice/cpu.max": "max 100000",
        "a.slice/b c/cpu.max": "100 100000",
    }
    root = machine(tmp_path, "0::/a.slice/b c", V2.format(inner="/"), files)
    assert found(root) == {"a.slice/memory.max": (400, 0)}, "never less than nothing"
    assert usable_cores(root) == 1


@pytest.mark.parametrize(
    ("path", "inner"),
    [
        ("/docker/ab", "/docker/ab"),
        ("/", "/"),
        ("/docker/ab", "/kube"),
        ("/../../x", "/"),
        ("/", "/.."),
    ],
)
def test_a_mount_may_show_a_part_of_the_hierarchy(tmp_path: Path, path: str, inner: str) -> None:
    """Without a namespace of its own a container has its files, but the path of the host."""
    root = machine(tmp_path, f"0::{path}", V2.format(inner=inner), memory(str(8 * MIB), 2))
    assert found(root) == {"memory.max": (8, 6)}


def test_version_1_beside_an_empty_version_2(tmp_path: Path) -> None:
    groups = "4:memory:/job\n3:cpu,cpuacct:/job\n1:name=systemd:/\n0::/"
    mounts = [V1.format(n=n, inner="/", name=name) for n, name in ((1, "memory"), (2, "cpu"))]
    mounts.append("40 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw")
    stat = f"inactive_file 1\nhierarchical_memory_limit {600 * MIB}\ntotal_inactive_file {50 * MIB}"
    files = {
        "memory/memory.limit_in_bytes": GIANT,
        "memory/job/memory.limit_in_bytes": GIANT,
        "memory/job/memory.usage_in_bytes": str(250 * MIB),
        "memory/job/memory.stat": stat,
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "cpu/job/cpu.cfs_quota_us": "10000",
        "cpu/job/cpu.cfs_period_us": "100000",
    }
    root = machine(tmp_path, groups, "\n".join(mounts), files)
    assert found(root)["memory/job/memory.limit_in_bytes"] == (600, 400)
    assert found(root)["memory/memory.limit_in_bytes"][0] > 2**40, "no limit"
    assert usable_cores(root) == 1


@pytest.mark.parametrize(("quota", "cores"), [("150000", 2), ("400000", 4), ("max", 6)])
def test_a_part_of_a_core_is_a_core(
    tmp_path: Path, quota: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    files = {"cpu.max": f"{quota} 100000"}
    assert usable_cores(machine(tmp_path, "0::/", V2.format(inner="/"), files)) == cores


def test_without_control_groups_nothing_is_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory_limits(tmp_path) == []
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores(tmp_path) == os.cpu_count(), "other systems have no affinity"


def test_memory_is_the_least_of_machine_and_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [MemoryLimit(9 * MIB, 1 * MIB, Path("/a")), MemoryLimit(8 * MIB, 7 * MIB, Path("/b"))]
    monkeypatch.setattr(host_memory, "memory_limits", lambda: limits)
    assert (host_memory.available_bytes(), host_memory.available_owner()) == (1 * MIB, "/a")
    assert (host_memory.total_bytes(), host_memory.total_owner()) == (8 * MIB, "/b")
    limits[:] = [MemoryLimit(2**63, 2**63, Path("/a"))]
    assert host_memory.total_bytes() < 2**50
    assert host_memory.total_owner() == host_memory.available_owner() == "the machine"


def test_threads_are_lowered_to_a_quota_unless_someone_says_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    settings = WorkerSettings(model="m", device="cpu")
    monkeypatch.setattr(process, "usable_cores", lambda: 1)
    monkeypatch.setattr(process, "_reuse_freed_memory", lambda: None)
    try:
        torch.set_num_threads(2)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        process.prepare_process(settings)
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
        process.prepare_process(settings)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_blanks_in_mount_points_are_octal() -> None:
    assert cgroups._unescaped(r"/sys/a\040b\134") == "/sys/a b\\"
