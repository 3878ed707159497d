"""Files that survive a crash: synced, and their names with them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def reserve(file: int, nbytes: int) -> None:
    """Makes an open file that long, and sure of its space where the file system can be asked for that."""
    try:
        os.posix_fallocate(file, 0, nbytes)
    except AttributeError:  # macOS has none
        os.ftruncate(file, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, nbytes)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as reading, target.open("wb") as writing:
        shutil.copyfileobj(reading, writing)
        writing.flush()
        os.fsync(writing.fileno())


def make_folders(folder: Path, file: str) -> None:
    """Those above a file within `folder`."""
    for above in reversed([folder / parent for parent in Path(file).parents][:-1]):
        if not above.is_dir():
            above.mkdir()
            fsync_folder(above.parent)


def fsync_folder(folder: Path) -> None:
    """The names in it: a new file without its name is lost as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
