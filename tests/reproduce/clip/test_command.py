"""The command of the experiment on CLIP: its folders, options and errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery_kernels.reproduce.__main__ import main
from surgery_kernels.reproduce.clip.folders import find_tasks
from tests.clip_models import CLASSES

pytestmark = pytest.mark.any_isa


def test_tasks_in_the_papers_order_by_any_spelling(tmp_path: Path) -> None:
    models, data = tmp_path / "models", tmp_path / "data"
    for name in ("b32", "b32_stanford-cars", "b32_sun397", "zoo", "b16_sun397", "gtsrb"):
        (models / name).mkdir(parents=True)
        (models / name / "config.json").touch()
    (models / "notes").mkdir()
    for name in ("zoo", "Stanford_Cars", "SUN397", "mnist"):
        (data / name / "test").mkdir(parents=True)
    found = find_tasks(models, data, pretrained="b32")
    assert [task.name for task in found.tasks] == ["sun397", "stanford-cars", "zoo"]
    assert [task.expert.name for task in found.tasks] == ["b32_sun397", "b32_stanford-cars", "zoo"]
    assert [path.name for path in found.without_images] == ["b16_sun397", "gtsrb"]
    assert [path.name for path in found.without_expert] == ["mnist"]
    chosen = find_tasks(models, data, pretrained="b32", wanted=["zoo", "Cars", "zoo"])
    assert [task.name for task in chosen.tasks] == ["zoo", "stanford-cars"]
    assert not chosen.without_images and not chosen.without_expert


def test_what_is_left_out_is_said(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "mnist").symlink_to(data_dir / "mnist")
    (data / "svhn" / "test").mkdir(parents=True)
    folders = [f"--model-dir={model_dir}", f"--data-dir={data}", f"--out={tmp_path}"]
    main(["clip", *folders, "--methods", "pretrained"])
    printed = capsys.readouterr().out
    assert f"{model_dir / 'DTD'} is left out: it has no images in {data}\n" in printed
    assert f"{data / 'svhn'} is left out: it has no expert in {model_dir}\n" in printed


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a run that ends at once."""
    with pytest.raises(SystemExit) as stopped:
        main(["clip", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()
    return error[-1]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=x", "--steps must be a whole number from 1, got x"),
        ("--adamerging-steps=0", "--adamerging-steps must be a whole number from 1, got 0"),
        ("--rank=0", "--rank must be a whole number from 1, got 0"),
        ("--v2-rank=-4", "--v2-rank must be a whole number from 1, got -4"),
        ("--images=0", "--images must be a whole number from 1, got 0"),
        ("--batch-size=1.5", "--batch-size must be a whole number from 1, got 1.5"),
        ("--test-batch-size=0", "--test-batch-size must be a whole number from 1, got 0"),
        ("--max-images=0", "--max-images must be a whole number from 1, got 0"),
        ("--workers=-1", "--workers must be a whole number from 0, got -1"),
        ("--seed=-1", "--seed must be a whole number from 0 to 4294967295, got -1"),
        ("--device=nowhere", "--device must be one that torch can use, got nowhere"),
        ("--device=meta", "--device must be cpu for surgery and adamerging, whose ops run there, got meta"),
        (
            "--pretrained=b32",
            "--model-dir must hold the folder of a pretrained model with a config.json, got no 'b32' in",
        ),
        ("--tasks=svhn", "--tasks must have an expert each, got none for 'svhn' in"),
        ("--heads=heads.bin", "--heads must be a safetensors file or a folder, got heads.bin"),
        (
            "--templates=none.json",
            "--templates must be a JSON file of lists of sentences with {} by task, got none.json",
        ),
    ],
)
def test_options_out_of_range(
    option: str, message: str, model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [f"--model-dir={model_dir}", f"--data-dir={data_dir}", f"--out={tmp_path}"]
    assert said(capsys, *folders, option).startswith(message)


def test_missing_folders(model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere, out = tmp_path / "nowhere", f"--out={tmp_path}"
    assert "--data-dir" in said(capsys, f"--model-dir={model_dir}")
    message = said(capsys, f"--model-dir={nowhere}", f"--data-dir={data_dir}", out)
    assert message == f"--model-dir must be a folder, got {nowhere}"
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={nowhere}", out)
    assert message == f"--data-dir must be a folder, got {nowhere}"
    (tmp_path / "data" / "svhn").mkdir(parents=True)
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={tmp_path / 'data'}", out)
    shared = "--model-dir and --data-dir must share a task, got experts for dtd, mnist, eurosat and images for svhn"
    assert message == shared
    message = said(capsys, f"--model-dir={data_dir}", f"--data-dir={data_dir}", out)
    assert message.endswith(f"got no 'pretrained' in {data_dir} (models there: none): name it with --pretrained")
    folders = [f"--model-dir={model_dir}", f"--data-dir={data_dir}", out]
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train").mkdir()
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={tmp_path}", out)
    assert message.startswith(f"{tmp_path / 'mnist'} must have a folder test of <class>/<image>.png or written by")
    (tmp_path / "mnist" / "test").mkdir()
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={tmp_path}", out)
    assert message.endswith(
        "must hold <class>/<image>.png (.jpg, ...) or be written by datasets' save_to_disk, got neither"
    )
    (tmp_path / "mnist" / "test" / "0").mkdir()
    message = said(capsys, f"--model-dir={model_dir}", f"--data-dir={tmp_path}", out)
    assert message == f"every class folder must hold an image, got none in {tmp_path / 'mnist' / 'test' / '0'}"
    (tmp_path / "heads.safetensors").write_bytes(b"broken")
    message = said(capsys, *folders, f"--heads={tmp_path / 'heads.safetensors'}")
    assert message.startswith("every safetensors file must be readable, got ")
    for heads in ({"mnist": torch.zeros(3, 16)}, {name: torch.zeros(2, 16) for name in CLASSES}):
        save_file(heads, tmp_path / "heads.safetensors")
        message = said(capsys, *folders, f"--heads={tmp_path / 'heads.safetensors'}", "--tasks", "mnist", "dtd")
        assert message in (
            "--heads must hold a tensor for every task, got mnist, not dtd",
            "the head of mnist must be [classes, num_features] of shape [3, 16], got [2, 16]",
        )
    message = said(capsys, *folders, f"--heads={tmp_path / 'mnist'}")
    assert message == f"--heads must hold eurosat.safetensors or eurosat.pt, got none in {tmp_path / 'mnist'}"


def test_missing_packages_are_named(
    model_dir: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [f"--model-dir={model_dir}", f"--data-dir={data_dir}", f"--out={tmp_path}"]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "datasets", None)
        message = said(capsys, *folders, "--tasks=dtd")
    assert message.startswith("datasets must be installed to read ") and message.endswith("'surgery-kernels[clip]'")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "transformers", None)
        for module in ("experiment", "heads", "models"):
            patched.delitem(sys.modules, f"surgery_kernels.reproduce.clip.{module}")
        message = said(capsys, *folders)
    assert message == "transformers must be installed for this experiment: pip install 'surgery-kernels[clip]'"
