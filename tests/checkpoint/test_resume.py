"""Merges that were stopped, and what goes on from them."""

from __future__ import annotations

import _thread
import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.plan import plan_merge
from surgery_kernels.checkpoint.reading import read_ahead
from surgery_kernels.checkpoint.writing import writer
from surgery_kernels.checkpoint.writing.journal import Journal
from surgery_kernels.recipes import load_recipe
from tests.checkpoints import files_in, save_lora, save_models, state_dict, ties_recipe
from tests.failing import after, no_room

pytestmark = pytest.mark.any_isa

Models = list[dict[str, torch.Tensor]]
OTHER_MERGE = (
    "resume must be of the same recipe, checkpoints and options, got {!r} of another merge: remove it to start over"
)


@pytest.fixture(autouse=True)
def synced_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is on disk before the next one is merged."""
    monkeypatch.setattr(writer, "SYNC_BYTES", 1)
    monkeypatch.setattr(writer, "PENDING_BYTES", 0)


@pytest.fixture
def models() -> Models:
    return [state_dict(seed) for seed in range(3)]


@pytest.fixture
def given(tmp_path: Path, models: Models) -> dict[str, Any]:
    return ties_recipe(save_models(tmp_path / "models", models, config={"model_type": "toy"}))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


@pytest.fixture
def expected(tmp_path: Path, given: dict[str, Any]) -> dict[str, bytes]:
    (tmp_path / "expected").mkdir()
    merge(given, tmp_path / "expected" / "out")
    return files_in(tmp_path / "expected" / "out")


def stop(given: dict[str, Any], out: Path, **options: Any) -> None:
    """Runs out of room after two of the tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", after(3, os.pwrite, no_room))  # the header is the first to be written
        with pytest.raises(OSError, match="No space left"):
            merge(given, out, **options)
    assert not out.exists() and len(done(out)) == 2


def partial(out: Path) -> Path:
    return out.with_name("out.partial")


def done(out: Path) -> list[str]:
    lines = map(json.loads, (partial(out) / "journal.jsonl").read_text().splitlines())
    return [name for line in lines for name in line.get("done", ())]


def of_the_model(given: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**given, "scope": "model"}]


def of_wide_tensors(given: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**given, "dtype": "float64", "out_dtype": "float32"}]


def of_documents_and_slices(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The second takes a layer of what the first has made, twice."""
    sources = [{"model": model, "layer_range": [0, 1]} for model in ("first", given["base_model"])]
    slices = [{"sources": sources}, {"sources": sources[::-1]}]
    last = {"merge_method": "slerp", "base_model": "first", "slices": slices, "parameters": {"t": 0.25}}
    return [{**given, "name": "first"}, last]


@pytest.mark.parametrize(
    ("how", "recipes", "options"),
    [
        ("everywhere", of_the_model, []),
        ("thirds", of_the_model, ["once"]),
        ("anytime", of_wide_tensors, []),
        ("thirds", of_documents_and_slices, []),
    ],
)
def test_killed(
    run_python: Callable[..., str],
    given: dict[str, Any],
    out: Path,
    tmp_path: Path,
    how: str,
    recipes: Any,
    options: list[str],
) -> None:
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump_all(recipes(given)))
    counts = json.loads(run_python("-m", "tests.killed_merges", how, str(tmp_path / "recipe.yml"), str(out), *options))
    assert counts["killed"] >= 20 and counts["resumed"] > 0 and counts["different"] == 0


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_disk_full_in_the_middle(given: dict[str, Any], out: Path, tmp_path: Path, scope: str) -> None:
    given["scope"] = scope
    stop(given, out)
    merge(given, out, resume=True)
    merge(given, tmp_path / "out")
    assert files_in(out) == files_in(tmp_path / "out") and not partial(out).exists()


def test_disk_full_at_the_reservation(given: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", no_room, raising=False)
    with pytest.raises(OSError, match="No space left"):
        merge(given, out)
    assert os.listdir(out.parent) == []


def test_disk_full_in_a_line_of_the_journal(
    given: dict[str, Any], out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    with monkeypatch.context() as patch:
        # two lines, then the beginning of a third
        patch.setattr(os, "write", after(2, real, after(1, lambda file, data: real(file, data[:7]), no_room)))
        with pytest.raises(OSError, match="No space left"):
            merge(given, out)
    assert (partial(out) / "journal.jsonl").read_bytes().endswith(b'\n{"done"')
    merge(given, out, resume=True)
    assert files_in(out) == expected


def test_writes_that_take_a_part(
    given: dict[str, Any], out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, write = os.pwrite, os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:9]))
    stop(given, out)
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:50], offset))
    merge(given, out, resume=True)
    assert files_in(out) == expected


def unsupported(*_: object) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.mark.parametrize("reserving", [None, unsupported], ids=["no such call", "not on this file system"])
def test_without_reservations(
    given: dict[str, Any], out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, reserving: Any
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    if reserving:
        monkeypatch.setattr(os, "posix_fallocate", reserving, raising=False)
    stop(given, out)
    merge(given, out, resume=True)
    assert files_in(out) == expected


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_unreadable_input(given: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, scope: str) -> None:
    def unreadable(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(read_ahead, "_is_cached", lambda *_: False)  # what was just written is
    monkeypatch.setattr(os, "pread", unreadable)
    with pytest.raises(OSError, match="Input/output error"):
        merge({**given, "scope": scope}, out)
    assert os.listdir(out.parent) == []


def test_interrupted(
    given: dict[str, Any], out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressing_control_c(*arguments: Any) -> int:
        _thread.interrupt_main()
        return pwrite(*arguments)

    pwrite = os.pwrite
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", after(2, pwrite, after(1, pressing_control_c, pwrite)))
            with pytest.raises(KeyboardInterrupt):
                merge(given, out)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not out.exists() and done(out)
    merge(given, out, resume=True)
    assert files_in(out) == expected


def test_resume_without_anything_to_go_on_from(given: dict[str, Any], out: Path, expected: dict[str, bytes]) -> None:
    merge(given, out, resume=True)
    assert files_in(out) == expected


def touch(given: dict[str, Any], options: dict[str, Any]) -> None:
    os.utime(Path(given["base_model"]) / "model.safetensors", ns=(1, 1))


def another_recipe(given: dict[str, Any], options: dict[str, Any]) -> None:
    given["models"][0]["parameters"]["weight"] = 2


def another_policy(given: dict[str, Any], options: dict[str, Any]) -> None:
    options["nonfinite"] = "drop"


def other_files(given: dict[str, Any], options: dict[str, Any]) -> None:
    options["max_shard_bytes"] = 200


def another_torch(given: dict[str, Any], options: dict[str, Any]) -> None:
    torch.__version__ += ".other"


@pytest.mark.parametrize("change", [touch, another_recipe, another_policy, other_files, another_torch])
def test_resume_of_another_merge(
    given: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    stop(given, out)
    before = files_in(out.parent)
    monkeypatch.setattr(torch, "__version__", torch.__version__)  # restored afterwards
    options: dict[str, Any] = {}
    change(given, options)
    with pytest.raises(ValueError, match=f"^{re.escape(OTHER_MERGE.format(str(partial(out))))}$"):
        merge(given, out, resume=True, **options)
    assert files_in(out.parent) == before and not out.exists()


def test_resume_with_another_model_below_an_adapter(given: dict[str, Any], out: Path, tmp_path: Path) -> None:
    below = given["models"][0]["model"]
    adapter = save_lora(tmp_path / "adapter", {"layers.0": (torch.ones(2, 6), torch.ones(6, 2))})
    given["models"][0]["model"] = f"{below}+{adapter}"
    stop(given, out)
    os.utime(Path(below) / "model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match="of another merge"):
        merge(given, out, resume=True)


def test_resume_with_tokens_in_other_rows(given: dict[str, Any], models: Models, out: Path, tmp_path: Path) -> None:
    named = [{name.replace("embed", "embed_tokens"): x for name, x in model.items()} for model in models]
    folders = save_models(tmp_path / "models", named)
    tokens = {f"t{i}": i for i in range(11)}

    def write(folder: str, rows: dict[str, int]) -> None:
        (Path(folder) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": rows}}))

    write(folders[0], tokens)
    write(folders[1], {**tokens, "t0": 1, "t1": 0})
    given["tokenizer_source"] = "base"
    stop(given, out)
    write(folders[1], {**tokens, "t0": 2, "t2": 0})
    with pytest.raises(ValueError, match="of another merge"):
        merge(given, out, resume=True)


def test_two_at_once(given: dict[str, Any], out: Path, expected: dict[str, bytes]) -> None:
    stop(given, out)
    with plan_merge(load_recipe(given)) as plan:
        other = Journal(partial(out) / "journal.jsonl", plan.identity)
    before = files_in(out.parent)
    message = f"out must not be written by another process, got {str(partial(out))!r} in use"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge(given, out, resume=True)
    assert files_in(out.parent) == before
    other.close()
    merge(given, out, resume=True)
    assert files_in(out) == expected


def test_out_of_somebody_else(given: dict[str, Any], out: Path) -> None:
    """Not the result of an earlier try, however it came to be there."""
    out.mkdir()
    partial(out).mkdir()
    with pytest.raises(ValueError, match=f"^out must not exist, got {re.escape(repr(str(out)))}$"):
        merge(given, out, resume=True)
    assert list(out.iterdir()) == [] and not partial(out).exists()


def test_torn_journal(given: dict[str, Any], out: Path, expected: dict[str, bytes]) -> None:
    stop(given, out)
    with (partial(out) / "journal.jsonl").open("a") as file:
        file.write('{"done":["norm.sc')
    merge(given, out, resume=True)
    assert files_in(out) == expected


@pytest.mark.parametrize("nbytes", [None, 100])
def test_lost_shards(given: dict[str, Any], out: Path, nbytes: int | None) -> None:
    stop(given, out)
    path = partial(out) / "model" / "model.safetensors"
    size = path.stat().st_size
    path.unlink() if nbytes is None else os.truncate(path, nbytes)
    message = (
        f"{path} must be as the earlier merge left it, {size} bytes, got {nbytes or 0}: "
        f"remove {str(partial(out))!r} to start over"
    )
    with pytest.raises(OSError, match=f"^{re.escape(message)}$"):
        merge(given, out, resume=True)
    assert not out.exists()


@pytest.mark.parametrize(("number", "kept"), [(0, False), (2, True)])
def test_nan(given: dict[str, Any], models: Models, out: Path, tmp_path: Path, number: int, kept: bool) -> None:
    floating = [{name: x for name, x in model.items() if x.is_floating_point()} for model in models]
    folders = save_models(tmp_path / "models", floating)
    with plan_merge(load_recipe(given)) as plan:
        names = [step.name for step in plan.steps]
    models[2][names[number]].view(-1)[:1] = torch.nan
    save_models(tmp_path / "models", floating)
    message = (
        f"experts[1] must be finite, got 1 NaN or infinite values in tensor {names[number]!r} "
        f"(experts[0] is {folders[1]}; experts[1] is {folders[2]})"
    )
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            merge(given, out, resume=True)
        assert not out.exists() and partial(out).exists() == kept
        if kept:
            assert done(out) == names[:number]
