"""The tasks and experts of the digits experiment, and their checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from surgery_kernels.reproduce.digits import experts
from surgery_kernels.reproduce.digits.experts import Config, load_experts
from surgery_kernels.reproduce.digits.tasks import PATCH_ORDER, TASKS, TRANSFORMS, Split, load_splits
from surgery_kernels.reproduce.digits.training import accuracy, frozen_heads
from surgery_kernels.reproduce.digits.vit import VisionTransformer
from tests.tiny_digits import CHECKPOINTS, TINY, saved

pytestmark = pytest.mark.any_isa


@pytest.fixture(scope="module")
def splits() -> tuple[Split, Split]:
    return load_splits(seed=0, test_fraction=0.3)


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
    assert accuracy(encoder(data.images[0]), heads, data, 0) == 90
    assert accuracy(encoder(data.images[1]), heads, data, 1) == 0


def test_encoder_is_embed_blocks_and_projection() -> None:
    encoder = VisionTransformer(width=8, depth=3, num_heads=2, num_features=6)
    images = torch.randn(5, 8, 8)
    tokens = encoder.embed(images)
    assert tokens.shape == (5, 17, 8)
    for block in encoder.blocks:
        tokens = block(tokens)
    assert torch.equal(encoder(images), encoder.projection(encoder.norm(tokens[:, 0])))


def test_training_makes_experts(tmp_path: Path) -> None:
    config = replace(TINY, depth=1, width=32, num_features=32, expert_steps=60, expert_rate=5e-3)
    made = load_experts(config, tmp_path)
    for task, expert in enumerate(made.experts):
        before, after = (
            accuracy(config.encoder(state)(made.test.images[task]).detach(), made.heads, made.test, task)
            for state in (made.pretrained, expert)
        )
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
    assert trained == [(TASKS.index("flip"),)]
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
