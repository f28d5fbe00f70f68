"""Small files that are either the old one or the new one, never half of one."""

import errno
import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a temporary sibling, fsync, rename.

    Raises:
        OSError: no space left on disk, or another failure of the file system; the old file is intact.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise full_disk_error(error, path) from error


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file as a whole; floats come back bit for bit.

    Raises:
        ValueError: a number that is NaN or infinite: JSON has none.
        OSError: as `write_bytes`.
    """
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode("utf-8"))


def full_disk_error(error: OSError, path: Path) -> OSError:
    """The same error, saying what to do when the disk is full."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    return OSError(
        error.errno,
        f"no space left on disk while writing {path}. What was there before is intact; "
        f"free some space or choose a folder on another disk",
    )
