from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from surgery_kernels import merge_state_dicts
from surgery_kernels.reproduce import digits, eager, experts
from surgery_kernels.reproduce.__main__ import main
from surgery_kernels.reproduce.experts import Config, load_experts
from surgery_kernels.reproduce.report import table
from surgery_kernels.reproduce.tasks import PATCH_ORDER, TASKS, TRANSFORMS, Split, load_splits
from surgery_kernels.reproduce.timing import time_ties
from surgery_kernels.reproduce.training import accuracy, frozen_heads
from surgery_kernels.reproduce.vit import VisionTransformer

pytestmark = pytest.mark.any_isa

TINY = Config(width=8, depth=1, num_heads=2, num_features=6, pretrain_steps=2, expert_steps=2, multi_task_steps=2)
PLOTS = ("accuracy_by_task.png", "average_accuracy.png")
CHECKPOINTS = {"pretrained", "multi-task", *(f"expert-{name}" for name in TASKS)}


def saved(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def splits() -> tuple[Split, Split]:
    return load_splits(seed=0, test_fraction=0.3)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    load_experts(TINY, folder)
    return folder


def test_transforms_are_the_ones_named() -> None:
    image = np.arange(64, dtype=np.float32).reshape(8, 8) / 64
    shuffled = np.empty_like(image)
    for to, source in enumerate(PATCH_ORDER):
        (row, column), (from_row, from_column) = divmod(to, 4), divmod(source, 4)
        shuffled[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = image[
            2 * from_row : 2 * from_row + 2, 2 * from_column : 2 * from_column + 2
        ]
    expected = {
        "identity": image,
        "rot90": np.rot90(image),
        "invert": -image,
        "transpose": image.T,
        "rot180": image[::-1, ::-1],
        "flip": image[:, ::-1],
        "shuffle": shuffled,
        "invert+rot270": -np.rot90(image, 3),
    }
    assert list(TRANSFORMS) == list(expected)
    images = torch.from_numpy(np.stack([image, image + 1]))
    for name, transform in TRANSFORMS.items():
        np.testing.assert_array_equal(transform(images)[0].numpy(), expected[name], err_msg=name)
    assert sorted(PATCH_ORDER) == list(range(16))


def test_splits_share_out_the_dataset(splits: tuple[Split, Split]) -> None:
    train, test = splits
    assert train.images.shape == (8, 1257, 8, 8) and test.images.shape == (8, 540, 8, 8)
    pixels = (torch.cat([train.images[0], test.images[0]]).reshape(-1, 64) + 1) * 8
    labelled = torch.cat([pixels, torch.cat([train.labels, test.labels])[:, None]], dim=1)
    whole = load_digits()
    assert sorted(labelled.tolist()) == sorted(np.column_stack([whole.data, whole.target]).tolist())
    assert all(50 <= count <= 58 for count in test.labels.bincount())
    assert torch.equal(load_splits(0, 0.3)[1].labels, test.labels)
    assert not torch.equal(load_splits(1, 0.3)[1].labels, test.labels)


def test_tasks_conflict(splits: tuple[Split, Split]) -> None:
    """Nearest class mean: right on its own task, and lost on every other."""
    train, test = splits
    means = torch.stack(
        [train.images[:, train.labels == label].mean(1) for label in range(10)], dim=1
    )  # [num_tasks, classes, 8, 8]
    for fitted, own in enumerate(means.flatten(2)):
        for task, images in enumerate(test.images.flatten(2)):
            correct = (torch.cdist(images, own).argmin(1) == test.labels).float().mean()
            assert correct > 0.85 if task == fitted else correct < 0.5, (TASKS[fitted], TASKS[task])


def test_heads_are_noisy_prototypes() -> None:
    prototypes, heads = frozen_heads(num_features=32, noise=0.8, seed=3)
    assert heads.shape == prototypes.shape == (8, 10, 32)
    torch.testing.assert_close(heads.norm(dim=-1), torch.ones(8, 10))
    assert not heads.requires_grad
    assert torch.equal(prototypes[0], prototypes[7]) and not torch.equal(heads[0], heads[7])
    assert 0.6 < (prototypes * heads).sum(-1).mean() < 0.9  # cosine: 1 / sqrt(1 + 0.8^2) = 0.78
    assert all(map(torch.equal, frozen_heads(32, 0.8, 3), (prototypes, heads)))
    torch.testing.assert_close(*frozen_heads(32, 0.0, 3))


def test_accuracy_uses_the_head_of_the_task() -> None:
    labels = torch.arange(10)
    data = Split(labels.float().reshape(1, 10, 1, 1).expand(2, 10, 8, 8), labels)

    def encoder(images: torch.Tensor) -> torch.Tensor:
        return torch.eye(10)[images[:, 0, 0].long()]

    heads = torch.stack([torch.eye(10), torch.eye(10).roll(1, 0)])
    heads[0, 9] = 0
    assert accuracy(encoder, heads, data, 0) == 90
    assert accuracy(encoder, heads, data, 1) == 0


def test_encoder_is_embed_blocks_and_projection() -> None:
    encoder = VisionTransformer(width=8, depth=3, num_heads=2, num_features=6)
    images = torch.randn(5, 8, 8)
    tokens = encoder.embed(images)
    assert tokens.shape == (5, 17, 8)
    for block in encoder.blocks:
        tokens = block(tokens)
    assert torch.equal(encoder(images), encoder.projection(encoder.norm(tokens[:, 0])))


def test_training_makes_experts(tmp_path: Path) -> None:
    config = replace(TINY, width=32, num_features=32, expert_steps=60, expert_rate=5e-3)
    made = load_experts(config, tmp_path)
    for task, expert in enumerate(made.experts):
        before = accuracy(config.encoder(made.pretrained), made.heads, made.test, task)
        after = accuracy(config.encoder(expert), made.heads, made.test, task)
        assert after > before + 10, TASKS[task]


def test_seed_decides_every_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(99)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    load_experts(TINY, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    load_experts(replace(TINY, seed=1), tmp_path / "other")
    expected, other = saved(tiny_folder), saved(tmp_path / "other")
    assert set(expected) == CHECKPOINTS
    assert len(set(expected.values())) == len(expected)
    assert saved(tmp_path / "again") == expected
    assert all(other[name] != expected[name] for name in expected)


def test_only_missing_checkpoints_are_trained(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = saved(tiny_folder)
    for name, content in expected.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    (tmp_path / "expert-flip.safetensors").unlink()
    trained = []
    train = experts.train
    monkeypatch.setattr(
        experts, "train", lambda *args, **kwargs: (trained.append(kwargs["tasks"]), train(*args, **kwargs))
    )
    load_experts(TINY, tmp_path)
    assert trained == [[TASKS.index("flip")]]
    assert saved(tmp_path) == expected


def test_a_stopped_run_leaves_no_broken_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: dict[str, torch.Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(experts, "save_file", fail)
        load_experts(TINY, tmp_path)
    assert not saved(tmp_path)


def test_fingerprint_follows_settings_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config().fingerprint() == Config().fingerprint()
    assert len({Config().fingerprint(), Config(seed=1).fingerprint(), Config(expert_steps=101).fingerprint()}) == 3
    before = Config().fingerprint()
    changed = tmp_path / "vit.py"
    changed.write_text("width = 65\n")
    monkeypatch.setattr(experts.vit, "__file__", str(changed))
    assert Config().fingerprint() != before


def test_merges_follow_their_formulas(tiny_folder: Path) -> None:
    base = load_file(tiny_folder / "pretrained.safetensors")
    tuned = [load_file(tiny_folder / f"expert-{name}.safetensors") for name in TASKS]
    merged = {name: merge_state_dicts(base, tuned, **options) for name, options in digits.MERGES.items()}
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
    lines = table({"pretrained": [10.0] * 8, "TIES": [0.0] * 7 + [100.0]}).splitlines()
    assert lines[0].split() == ["accuracy", "in", "%", *(name.split("+")[0] for name in TASKS), "average"]
    assert lines[1].split() == ["+rot270"]
    assert lines[3].split() == ["pretrained", *["10.0"] * 9]
    assert lines[4].split() == ["TIES", *["0.0"] * 7, "100.0", "12.5"]
    assert len(lines) == 5 and len({len(line) for line in (lines[0], *lines[2:])}) == 1
    assert len(table({"weight averaging": [100.0] * 8}).splitlines()[0]) <= 100


def test_run_prints_the_table_and_writes_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits.run(TINY, tmp_path)
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
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / "results.json").read_text())["accuracy"]
    assert list(results) == ["pretrained", "individual", "multi-task", *digits.MERGES]
    assert all(list(values) == list(TASKS) for values in results.values())
    assert table({name: list(values.values()) for name, values in results.items()}) in printed
    assert all(len(line) <= 100 for line in printed.splitlines() if str(folder) not in line)

    first = saved(folder)
    (folder / "pretrained.safetensors").write_bytes((folder / "multi-task.safetensors").read_bytes())
    digits.run(TINY, tmp_path, retrain=True)
    assert saved(folder) == first


@pytest.mark.parametrize("seed", ["-1", "1.5", "one", str(2**32)])
def test_seed_must_be_a_whole_number(seed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["digits", f"--seed={seed}", f"--out={tmp_path}"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"--seed must be a whole number from 0 to 4294967295, got {seed}\n"


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
    [([], "command"), (["letters"], "'letters'"), (["digits", "--steps=3"], "--steps=3")],
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
