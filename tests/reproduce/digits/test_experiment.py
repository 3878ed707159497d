"""The digits experiment: merges, repairs, tables, and the command."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from surgery_kernels.reproduce.__main__ import main
from surgery_kernels.reproduce.digits import ablations, eager, methods
from surgery_kernels.reproduce.digits import experiment as digits
from surgery_kernels.reproduce.digits.experts import Config, load_experts
from surgery_kernels.reproduce.digits.measure import Outcome, accuracies, measure, measure_jobs, run_job
from surgery_kernels.reproduce.digits.merges import merge
from surgery_kernels.reproduce.digits.tasks import TASKS
from surgery_kernels.reproduce.digits.timing import SurgeryTiming, published_setting, time_surgery, time_ties
from surgery_kernels.reproduce.digits.training import classify
from surgery_kernels.reproduce.jobs import Job, one_thread, processes
from surgery_kernels.reproduce.methods import MERGES
from surgery_kernels.reproduce.repair import Setting
from surgery_kernels.reproduce.report import table
from surgery_kernels.surgery import fit, representation_bias
from tests.tiny_digits import CHECKPOINTS, TINY, saved

pytestmark = pytest.mark.any_isa

SITES = ["blocks.0", "blocks.1", ""]  # of TINY
PLOTS = ("accuracy_by_task.png", "average_accuracy.png", "bias_by_depth.png", "features.png")


def test_merges_follow_their_formulas(tiny_folder: Path) -> None:
    base = load_file(tiny_folder / "pretrained.safetensors")
    tuned = [load_file(tiny_folder / f"expert-{name}.safetensors") for name in TASKS]
    made = load_experts(TINY, tiny_folder)
    merged = {name: merge(made, name, adamerging_steps=1) for name in MERGES}
    for name in base:
        stacked = torch.stack([expert[name] for expert in tuned])
        torch.testing.assert_close(merged["weight averaging"][name], stacked.mean(0))
        torch.testing.assert_close(merged["task arithmetic"][name], base[name] + 0.3 * (stacked - base[name]).sum(0))

    flat = torch.cat([base[name].flatten() for name in base])
    flat_experts = torch.stack([torch.cat([expert[name].flatten() for name in base]) for expert in tuned])
    expected = eager.ties_merge(flat, flat_experts, 0.2, 0.3)
    torch.testing.assert_close(torch.cat([merged["TIES"][name].flatten() for name in base]), expected)
    assert not torch.allclose(expected, flat, atol=1e-4)


def test_eager_ties_by_hand() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    task_vectors = torch.tensor([[4.0, -3.0, 1.0, 0.0], [-2.0, -5.0, 0.0, 1.0]])
    # density 0.25 of 4 keeps int(1) + 1 = 2: [4, -3, 0, 0] and [-2, -5, 0, 0]; elected +, -
    assert eager.ties_merge(base, base + task_vectors, 0.25, 0.5).tolist() == [3.0, -3.0, 1.0, 1.0]


def test_timing_compares_results(tiny_folder: Path) -> None:
    base = load_file(tiny_folder / "pretrained.safetensors")
    tuned = [load_file(tiny_folder / f"expert-{name}.safetensors") for name in TASKS]
    timing = time_ties(base, tuned, density=0.2, lam=0.3, repeats=3)
    assert len(timing.eager) == len(timing.op) == len(timing.state_dicts) == 3
    assert timing.largest_difference < 1e-6
    assert "times faster" in str(timing) and "bit for bit" in str(replace(timing, largest_difference=0.0))
    assert "differ by 2.0e-01" in str(replace(timing, largest_difference=0.2))


def test_table_has_a_column_per_task_and_the_average() -> None:
    lines = table({"pretrained": [10.0] * 8, "TIES": [0.0] * 7 + [100.0]}, TASKS).splitlines()
    assert lines[0].split() == ["accuracy", "in", "%", *(name.split("+")[0] for name in TASKS), "average"]
    assert lines[1].split() == ["+rot270"]
    assert lines[3].split() == ["pretrained", *["10.0"] * 9]
    assert lines[4].split() == ["TIES", *["0.0"] * 7, "100.0", "12.5"]
    assert len(lines) == 5 and len({len(line) for line in (lines[0], *lines[2:])}) == 1
    assert len(table({"weight averaging": [100.0] * 8}, TASKS).splitlines()[0]) <= 100


def test_table_names_repairs_below_their_merge_and_adds_columns() -> None:
    accuracies = {"TIES": [1.0], "TIES + Surgery": [2.0], "individual": [3.0]}
    lines = table(accuracies, ["digits"], {"bias": {"TIES": "0.250"}}).splitlines()
    assert lines[0].split() == ["accuracy", "in", "%", "digits", "average", "bias"]
    assert [line.split() for line in lines[2:]] == [
        ["TIES", "1.0", "1.0", "0.250"],
        ["+", "Surgery", "2.0", "2.0"],
        ["individual", "3.0", "3.0"],
    ]
    assert lines[3].startswith("  + Surgery")


@pytest.mark.parametrize("setting", [Setting("v1", 3, steps=4), Setting("v2", 2, steps=4)])
def test_fit_is_the_published_loop(setting: Setting, tiny_folder: Path) -> None:
    """The eager loop merges again and runs the expert at every step; what it learns is the same."""
    made = load_experts(TINY, tiny_folder)
    images, adapters = published_setting(made, setting.mode, setting.rank, setting.steps)
    encoder = TINY.encoder(made.pretrained)
    losses = eager.surgery(encoder, made.pretrained, made.experts, 0.3, images, adapters, lr=1e-3)
    fitted = fit(
        TINY.encoder(merge(made, "task arithmetic")),
        dict(zip(TASKS, made.experts, strict=True)),
        dict(zip(TASKS, made.test.images, strict=True)),
        setting.mode,
        rank=setting.rank,
        steps=setting.steps,
        legacy_zero_grad=True,
        progress=False,
    )
    torch.testing.assert_close(fitted.log.bias.sum(-1), losses, rtol=1e-5, atol=1e-6)
    assert losses.shape == (4, 8) and not torch.equal(losses[0], losses[-1])
    expected = [factor for adapter in adapters[0] for factor in adapter or ()]  # later tasks end earlier, on momentum
    fitted_factors = [
        factor[0] for pair in zip(fitted.adapters.down, fitted.adapters.up, strict=True) for factor in pair
    ]
    for theirs, ours in zip(expected, fitted_factors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_time_surgery_scales_to_all_steps(tiny_folder: Path) -> None:
    made = load_experts(TINY, tiny_folder)
    timing = time_surgery(made, "Surgery", "v1", 2, lam=0.3, steps=1000, ours=0.5, eager_steps=2)
    assert timing.eager_seconds > 0
    assert replace(timing, eager_seconds=0.1).speedup == pytest.approx(100)
    assert "100 times faster" in str(replace(timing, eager_seconds=0.1))


def test_processes_come_to_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    jobs = [Job("TIES"), Job("TIES", Setting("v1", 2, steps=2, num_samples=20, on_train=True))]
    with processes() as pool:
        load_experts(TINY, tmp_path, pool)
        side_by_side = measure_jobs(pool, TINY, tiny_folder, jobs)
    assert saved(tmp_path) == saved(tiny_folder)
    assert list(side_by_side) == jobs
    made = load_experts(TINY, tiny_folder)
    with one_thread():
        for job, outcome in side_by_side.items():
            here = run_job(TINY, tiny_folder, job, merge(made, "TIES"))
            assert here.accuracy == outcome.accuracy and here.bias == outcome.bias
            assert torch.equal(here.features, outcome.features)
            assert (outcome.seconds > 0) == (outcome.cpu_seconds > 0) == (job.setting is not None)
    merged, repaired = side_by_side.values()
    assert repaired.bias["blocks.0"] == merged.bias["blocks.0"] and repaired.final_bias != merged.final_bias


def test_bias_is_that_of_the_library(tiny_folder: Path) -> None:
    made = load_experts(TINY, tiny_folder)
    merged = TINY.encoder(merge(made, "TIES"))
    found = measure(made, [merged] * len(TASKS))
    per_task = [
        representation_bias(merged, TINY.encoder(expert), images)
        for expert, images in zip(made.experts, made.test.images, strict=True)
    ]
    for site, bias in found.bias.items():
        assert bias == pytest.approx(sum(of_task[site] for of_task in per_task) / len(TASKS), rel=1e-6)
    right = (classify(merged(made.test.images[3]), made.heads[3][None]).argmax(-1) == made.test.labels).double().mean()
    assert found.accuracy[3] == pytest.approx(100 * right.item())
    torch.testing.assert_close(found.features, merged(made.test.images[0]).detach())
    assert accuracies(made, [made.pretrained] * 3 + [merge(made, "TIES")] * 5)[3:] == found.accuracy[3:]


def outcome(accuracy: float, bias: float) -> Outcome:
    return Outcome([accuracy] * 8, {"blocks.0": 9.0, "": bias}, torch.zeros(2, 2))


def test_over_seeds_is_mean_and_range() -> None:
    seeds = [
        {"TIES": outcome(60, 1.0), "TIES + SurgeryV2": outcome(90, 0.25), "individual": outcome(95, 0.0)},
        {"TIES": outcome(70, 2.0), "TIES + SurgeryV2": outcome(94, 0.3), "individual": outcome(97, 0.0)},
    ]
    lines = [line.split() for line in digits.over_seeds(seeds).splitlines()]
    assert lines[2:] == [
        ["TIES", "65.0", "60.0", "70.0", "1.500"],
        ["+", "SurgeryV2", "92.0", "90.0", "94.0", "0.275", "20%"],
        ["individual", "96.0", "95.0", "97.0", "0.000"],
    ]


@pytest.mark.parametrize("full", [False, True])
def test_only_a_full_run_fits_v2_by_gradient(full: bool) -> None:
    repairs = digits.surgeries(20, full=full)
    assert ("SurgeryV2" in repairs) == full and len(repairs) == 6 + full
    assert all(setting.steps == 20 for setting in repairs.values())
    jobs = digits.jobs_of(repairs)
    assert len(jobs) == len(set(jobs)) == len(MERGES) * (len(repairs) + 1)
    outcomes = {"individual": outcome(95.0, 0.0)}
    for merged in MERGES:
        outcomes[merged] = outcome(60.0, 1.0)
        outcomes |= {f"{merged} + {name}": outcome(80.0 + i, 0.5) for i, name in enumerate(repairs)}
    words = digits.in_words(outcomes)
    assert "The best merge is 35.0 points below the experts, with Surgery 15.0" in words
    assert ("with SurgeryV2 13.0" in words) == full
    assert words.endswith(f"in closed form, from 64 images of each task instead of all, {12 if full else 13}.0.")

    by_method = {"Surgery": 1.5, **({"SurgeryV2": 60.0} if full else {}), "closed form": 0.25}
    timings = [SurgeryTiming(name, 1000, seconds, 5, 1.25) for name, seconds in by_method.items()]
    lines = digits.timing_text(timings).splitlines()
    assert lines[2].split() == ["Surgery", "1.50", "s", "250", "s", "167", "times", "faster"]
    fits = ["Surgery", *(["SurgeryV2"] if full else []), "closed"]
    assert [line.split()[0] for line in lines[2 : 2 + len(fits)]] == fits
    assert (lines[-1] == "  It is 240 times faster than SurgeryV2 here.") == full


def test_ablations_show_every_setting(tmp_path: Path) -> None:
    jobs = ablations.jobs("TIES")
    assert len(jobs) == len(set(jobs))
    outcomes = {job: outcome(float(i), 0.0) for i, job in enumerate(jobs)}
    lines = ablations.text("TIES", outcomes).splitlines()
    assert len(lines) == 1 + 2 * len(ablations.SWEEPS) and all(len(line) <= 100 for line in lines)
    assert lines[1].split() == ["rank", "Surgery", "4:", "0.0", "16:", "1.0", "52:", "2.0", "64:", "3.0"]
    ablations.plot("TIES", outcomes, 95.0, tmp_path / "ablations.png")
    assert (tmp_path / "ablations.png").read_bytes().startswith(b"\x89PNG")


def test_run_prints_the_tables_and_writes_every_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "processes", lambda: ThreadPoolExecutor(1))  # others take long to start
    digits.run_seeds([TINY], tmp_path, steps=2)
    printed = capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert folder.name == f"digits-{TINY.fingerprint()}"
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.safetensors" for name in CHECKPOINTS),
        *PLOTS,
        "config.json",
        "results.json",
        "results.txt",
    }
    for plot in PLOTS:
        assert (folder / plot).read_bytes().startswith(b"\x89PNG") and plot in printed
    results = json.loads((folder / "results.json").read_text())
    accuracy = results["accuracy"]
    repairs = [name for name in digits.SURGERIES if name != "SurgeryV2"]
    repaired = [f"{merged}{repair}" for merged in MERGES for repair in ("", *(f" + {name}" for name in repairs))]
    assert list(accuracy) == list(results["bias"]) == ["pretrained", *repaired, "multi-task", "individual"]
    assert all(list(values) == list(TASKS) for values in accuracy.values())
    assert set(results["bias"]["individual"].values()) == {0.0} and list(results["bias"]["TIES"]) == SITES
    bias = {name: f"{of_method['']:.3f}" for name, of_method in results["bias"].items()}
    assert table({name: list(values.values()) for name, values in accuracy.items()}, TASKS, {"bias": bias}) in printed
    assert (folder / "results.txt").read_text().strip() in printed
    assert all(len(line) <= 110 for line in printed.splitlines() if str(folder) not in line and ".png" not in line)

    first = saved(folder)
    (folder / "pretrained.safetensors").write_bytes((folder / "multi-task.safetensors").read_bytes())
    load_experts(TINY, folder)
    digits.forget(folder)
    load_experts(TINY, folder)
    assert saved(folder) == first


def test_methods_alone(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By task, those that look at images and repairs among them, and how far the published order holds."""
    copied = tmp_path / f"digits-{TINY.fingerprint()}"
    copied.mkdir()
    for name, content in saved(tiny_folder).items():
        (copied / f"{name}.safetensors").write_bytes(content)
    wanted = [
        "average",
        "adamerging",
        "regmean",
        "fisher",
        "emr",
        "slerp",
        "regmean_plus_plus",
        "calibrate",
        "closed_form",
    ]
    wanted.append("surgery")
    with ThreadPoolExecutor(1) as pool:
        found = methods.run(TINY, tmp_path, pool, wanted, steps=4)
    printed = capsys.readouterr().out
    assert [row.method for row in found] == wanted and set(wanted) <= set(methods.names())
    made = load_experts(TINY, tiny_folder)
    average_of = accuracies(made, [merge(made, "weight averaging")] * len(TASKS))
    assert found[0].accuracy == pytest.approx(average_of)
    assert all(row.seconds > 0 and row.nbytes_held > 0 for row in found)
    assert [row.method for row in found if row.nbytes == 0] == wanted[-4:]
    assert (copied / "methods.txt").read_text().strip() in printed and "The published order holds in" in printed
    assert [row["method"] for row in json.loads((copied / "methods.json").read_text())] == wanted
    assert (copied / "methods.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_methods_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["digits", f"--out={tmp_path}", "--methods", "ties", "sleep"])
    error = capsys.readouterr().err
    assert error.startswith("--methods must be all, or of linear, ") and error.endswith(", got sleep\n")


@pytest.mark.parametrize("seed", ["-1", "1.5", "one", str(2**32)])
def test_seed_must_be_a_whole_number(seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["digits", f"--seed={seed}", f"--out={tmp_path}"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"--seed must be a whole number from 0 to 4294967295, got {seed}\n"


@pytest.mark.parametrize("option", ["--seeds", "--steps"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5"])
def test_counts_must_be_whole_numbers(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["digits", f"{option}={value}", f"--out={tmp_path}"])
    assert capsys.readouterr().err == f"{option} must be a whole number from 1, got {value}\n"


def test_out_must_be_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for out in (file, file / "below"):
        with pytest.raises(SystemExit):
            main(["digits", f"--out={out}"])
        error = capsys.readouterr().err
        assert error.startswith(f"--out must be a folder that can be written, got {out}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "command"), (["letters"], "'letters'"), (["digits", "--step-size=3"], "--step-size=3")],
)
def test_unknown_arguments_get_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unreadable_checkpoint_names_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / f"digits-{Config().fingerprint()}"
    folder.mkdir()
    (folder / "pretrained.safetensors").write_bytes(b"broken")
    with pytest.raises(SystemExit):
        main(["digits", f"--out={tmp_path}"])
    assert capsys.readouterr().err.endswith("run again with --retrain\n")
