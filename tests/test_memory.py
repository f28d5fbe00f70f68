"""How much memory is left: the machine's, or less where control groups allow less."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe.train.device import memory_available
from moe.train.memory import SET_BY_USERS, host_memory_available

MIB = 2**20
MACHINE = 8000 * MIB


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal:       16000000 kB\nMemAvailable:   {MACHINE // 1024} kB\nHugePages_Total:       0\n"
    )
    return tmp_path


def put_in_group(root: Path, line: str) -> None:
    with (root / "proc" / "self" / "cgroup").open("a") as file:
        file.write(f"{line}\n")


def limit_group(folder: Path, *, most: int | str, used: int, inactive_file: int = 0) -> None:
    """A group of version 2 with a limit, in MiB."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most * MIB if isinstance(most, int) else most}\n")
    (folder / "memory.current").write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(
        f"anon {(used - inactive_file) * MIB}\nfile 77\ninactive_file {inactive_file * MIB}\nactive_file 5\n"
    )


def test_without_control_groups_it_is_what_the_machine_has(root):
    assert host_memory_available(root) == MACHINE
    put_in_group(root, "0::/")
    assert host_memory_available(root) == MACHINE


def test_a_container_may_take_its_limit_without_what_it_uses(root):
    put_in_group(root, "0::/")
    limit_group(root / "sys/fs/cgroup", most=1000, used=300)
    assert host_memory_available(root) == 700 * MIB


def test_files_in_the_page_cache_that_nobody_uses_are_free(root):
    put_in_group(root, "0::/")
    limit_group(root / "sys/fs/cgroup", most=1000, used=950, inactive_file=900)
    assert host_memory_available(root) == 950 * MIB


def test_every_group_up_to_the_outermost_one_counts(root):
    put_in_group(root, "0::/user.slice/job")
    top = root / "sys/fs/cgroup"
    limit_group(top / "user.slice" / "job", most="max", used=10)
    limit_group(top / "user.slice", most=500, used=100)
    assert host_memory_available(root) == 400 * MIB
    limit_group(top / "user.slice" / "job", most=50, used=10)
    assert host_memory_available(root) == 40 * MIB


def test_a_limit_above_what_the_machine_has_changes_nothing(root):
    put_in_group(root, "0::/")
    limit_group(root / "sys/fs/cgroup", most=10**6, used=1)
    assert host_memory_available(root) == MACHINE


def test_a_group_that_is_full_leaves_nothing(root):
    put_in_group(root, "0::/")
    limit_group(root / "sys/fs/cgroup", most=100, used=120)
    assert host_memory_available(root) == 0


def test_the_first_version_of_control_groups_counts_as_well(root):
    put_in_group(root, "5:cpu,cpuacct:/box")
    put_in_group(root, "4:memory:/box")
    folder = root / "sys/fs/cgroup/memory/box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(f"{600 * MIB}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{200 * MIB}\n")
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {50 * MIB}\n")
    assert host_memory_available(root) == 450 * MIB
    (folder.parent / "memory.limit_in_bytes").write_text("9223372036854771712\n")  # no limit
    (folder.parent / "memory.usage_in_bytes").write_text(f"{900 * MIB}\n")
    assert host_memory_available(root) == 450 * MIB


def test_a_group_that_is_not_mounted_here_is_that_of_the_mount(root):
    put_in_group(root, "0::/docker/abc")  # as the host calls it; in the container it is the root
    limit_group(root / "sys/fs/cgroup", most=1000, used=400)
    assert host_memory_available(root) == 600 * MIB


def test_where_linux_says_nothing_it_is_unknown(tmp_path):
    assert host_memory_available(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_here_it_is_a_number():
    assert (memory_available(torch.device("cpu")) or 0) > 10 * MIB
    assert memory_available(torch.device("meta")) is None


def test_what_the_allocator_of_a_gpu_holds_unused_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9999))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 120)
    assert memory_available(torch.device("cuda")) == 1380


REUSES = """
import json, resource, sys
import torch
from moe.train.memory import keep_freed_memory

def step():
    for buffer in [torch.empty(2**20) for _ in range(48)]:  # 48 of 4 MiB each: 192 MiB
        buffer.fill_(1)
    del buffer

def faults():
    step()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(json.dumps([faults(), keep_freed_memory(), faults()]))
"""


def page_faults(**environment: str) -> tuple[int, bool, int]:
    """In a process of its own: page faults of a step before, what `keep_freed_memory` says, and after."""
    ours = {name: value for name, value in os.environ.items() if name not in SET_BY_USERS} | environment
    done = subprocess.run(
        [sys.executable, "-c", REUSES], env=ours, capture_output=True, text=True, check=True
    )
    return tuple(json.loads(done.stdout))


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


@needs_glibc
def test_kept_memory_is_used_again_without_asking_linux():
    before, is_kept, after = page_faults()
    assert is_kept and after < before / 10


@needs_glibc
def test_malloc_is_left_to_whoever_tuned_it():
    _, is_kept, _ = page_faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert not is_kept
