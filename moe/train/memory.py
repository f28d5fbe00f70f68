"""How much memory a process can still take, also where a container allows it less than the machine has; and
what it does with memory that it has freed.
"""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT, _MAPPED_FROM = 1 << 30, 1 << 25  # bytes; the second is the most that glibc takes
SET_BY_USERS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}


class _Files(NamedTuple):
    """Where a version of cgroups keeps its figures, and the line of memory.stat that can be taken back."""

    mount: str
    limit: str
    used: str
    reclaimable: str


_V1 = _Files("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def host_memory_available(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take; None where that is unknown, outside Linux for example.

    What Linux calls MemAvailable, or less where a control group, such as that of a container, allows less: of
    every group from that of the process to the outermost one, its limit without what it uses. Files in the
    page cache count as used; those that nobody has looked at for a while (`inactive_file`) are dropped when
    memory is needed, so they are free here.

    root: below which /proc and /sys are.
    """
    facts = root / "proc/meminfo"
    if not facts.is_file():
        return None
    kibibytes = _numbers(facts, ":").get("MemAvailable")
    rooms = [] if kibibytes is None else [kibibytes * 1024]
    return min((*rooms, *_rooms_of_groups(root)), default=None)


def keep_freed_memory() -> bool:
    """Let this process keep up to a gigabyte that it has freed, and use it again; whether it can.

    A step of training allocates and frees the same activations as the step before. glibc gives them back to
    Linux, whose fresh pages are zeroed one by one at first touch: in the preset `language` 6,000 page faults
    and about 13 ms of system time a step. This is for the whole process, so for programs. False where malloc
    is not glibc's, or where its environment variables have already tuned it.
    """
    if os.name != "posix" or not SET_BY_USERS.isdisjoint(os.environ):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return bool(libc.mallopt(_TRIM_THRESHOLD, _KEPT) and libc.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM))


def _rooms_of_groups(root: Path) -> Iterator[int]:
    """What each control group of this process leaves."""
    groups = root / "proc/self/cgroup"
    if not groups.is_file():
        return
    for line in groups.read_text(encoding="utf-8").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        files = _V2 if number == "0" else _V1
        mount = root / files.mount
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and (room := _room(folder, files)) is not None:
                yield room


def _room(folder: Path, files: _Files) -> int | None:
    """What a control group leaves; None where it has no limit, as the outermost one."""
    limit, used, facts = folder / files.limit, folder / files.used, folder / "memory.stat"
    if not (limit.is_file() and used.is_file()):
        return None
    most = limit.read_text(encoding="ascii").strip()
    if most == "max":
        return None
    reclaimable = _numbers(facts, " ").get(files.reclaimable, 0) if facts.is_file() else 0
    return max(0, int(most) - max(0, int(used.read_text(encoding="ascii")) - reclaimable))


def _numbers(file: Path, separator: str) -> dict[str, int]:
    """The whole numbers of a file with a name and a number in each line."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(separator)
        words = rest.split()
        if words and words[0].isdecimal():
            found[name] = int(words[0])
    return found
