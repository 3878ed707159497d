"""The folder of the result: written aside under another name, renamed when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..sizes import format_size
from .durable import fsync_folder
from .journal import Journal


class OutputFolder:
    """`<out>.partial` beside `<out>`: the journal, temporary files, and `model/`, which becomes `<out>`."""

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.parent / f"{self.out.name}.partial"
        self.model = self.partial / "model"
        self.intermediates = self.partial / "intermediates"  # results of other merges that this one needs

    def check(self, nbytes: int, *, resume: bool) -> None:
        """Raises before anything is read or made.

        Raises:
            ValueError: `out` exists, an unfinished merge lies beside it that is not to be resumed, or the disk is full.
            OSError: the folder above it cannot be written to.
        """
        if os.path.lexists(self.out) and not (resume and self.partial.exists() and not self.model.exists()):
            raise ValueError(f"out must not exist, got {str(self.out)!r}")
        if self.partial.exists() and not resume:
            raise ValueError(
                f"out must have no unfinished merge beside it, got {str(self.partial)!r}: resume it, or remove it"
            )
        if not self.out.parent.is_dir():
            raise ValueError(f"out must be in a folder that exists, got {str(self.out)!r}")
        if not os.access(self.out.parent, os.W_OK | os.X_OK):
            raise PermissionError(f"out must be in a folder that can be written to, got {str(self.out)!r}")
        there = sum(file.stat().st_blocks * 512 for file in self.model.rglob("*")) if self.model.is_dir() else 0
        free = shutil.disk_usage(self.out.parent).free + there
        if nbytes > free:
            raise ValueError(f"out must be on a disk with {format_size(nbytes)} free, got {format_size(free)}")

    def begin(self, identity: str) -> Journal:
        """Makes the folders; what the journal of an earlier try says is done stays."""
        self.partial.mkdir(exist_ok=True)
        if not self.out.exists():
            self.model.mkdir(exist_ok=True)
        return Journal(self.partial / "journal.jsonl", identity)

    @contextmanager
    def begun(self, identity: str) -> Iterator[Journal]:
        """`begin`, with the lock held; what fails before anything was done that is worth going on with is removed."""
        journal = self.begin(identity)
        try:
            yield journal
        except BaseException:
            if not journal.done and journal.decided is None:
                self.abandon()
            raise
        finally:
            journal.close()  # and with it the lock

    def is_published(self, journal: Journal) -> bool:
        """Whether an earlier try got as far as the new name, and no further.

        Raises:
            ValueError: it did not, and `out` is somebody else's, made since `check`.
        """
        published = self.out.exists() and not self.model.exists()
        if published and not journal.done:
            raise ValueError(f"out must not exist, got {str(self.out)!r}")
        return published

    def publish(self) -> None:
        """Gives the complete model its name. Either all of it is there afterwards or, after a crash, nothing is."""
        fsync_folder(self.model)
        os.rename(self.model, self.out)
        fsync_folder(self.out.parent)

    def abandon(self) -> None:
        """Removes a merge that nothing was done of, but not what others have done for it."""
        if not self.intermediates.exists():
            self.discard()

    def discard(self) -> None:
        """Removes what lies beside the result: its name at once, so that a crash leaves no half of it to resume."""
        gone = self.partial.with_name(f".{self.partial.name}.gone")
        shutil.rmtree(gone, ignore_errors=True)  # of a crash right here
        os.rename(self.partial, gone)
        shutil.rmtree(gone)
        fsync_folder(self.out.parent)
