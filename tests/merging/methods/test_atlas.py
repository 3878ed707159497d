"""aTLAS against the same steps in eager PyTorch, and coefficients that are kept in files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import Learned
from surgery_kernels.reference.combine import groups_of
from tests.cases import assert_same, gaussian, inputs

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]


def models(num_tasks: int = 3) -> tuple[StateDict, list[StateDict]]:
    shapes = {"w": (9, 7), "b": (5,)}
    drawn = {name: inputs(gaussian, shape, num_tasks, torch.float32) for name, shape in shapes.items()}
    return {name: base for name, (base, _) in drawn.items()}, [
        {name: experts[t] for name, (_, experts) in drawn.items()} for t in range(num_tasks)
    ]


def objective(tensors: StateDict, step: int) -> Tensor:
    """Far from any expert, so that gradients are long at first."""
    return sum(((x - 0.3 * (1 + step % 2)) ** 2).sum() for x in tensors.values())


def learned_by(base: StateDict, experts: list[StateDict], **options: Any) -> tuple[StateDict, Learned]:
    found: list[Learned] = []
    merged = merge_state_dicts(base, experts, method="atlas", objective=objective, receive=found.append, **options)
    return merged, found[0]


def test_by_hand() -> None:
    base = {"w": torch.ones(2)}
    experts = [{"w": base["w"] + torch.tensor(x)} for x in ([1.0, 2], [0.0, 4])]
    options: dict[str, Any] = {"initial": torch.tensor([[0.5], [-0.25]]), "steps": 0}
    assert learned_by(base, experts, **options)[0]["w"].tolist() == [1.5, 1]
    gradients = []

    def summed(tensors: StateDict, step: int) -> Tensor:
        tensors["w"].register_hook(lambda grad: gradients.append(grad))
        return tensors["w"].sum()

    merge_state_dicts(base, experts, method="atlas", objective=summed, steps=1, clip=1e9, lr=1e-9, weight_decay=0)
    assert gradients[0].tolist() == [1, 1]


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_the_steps_of_eager_pytorch(granularity: str) -> None:
    base, experts = models()
    merged, found = learned_by(base, experts, granularity=granularity, steps=12, lr=0.05)
    task_vectors = {name: torch.stack([expert[name] - base[name] for expert in experts]) for name in base}
    raw = torch.zeros(3, 2 if granularity == "layer" else 1, requires_grad=True)
    optimizer = torch.optim.AdamW([raw], lr=0.05, weight_decay=0.1)

    def tensors() -> StateDict:
        columns = raw.expand(3, 2).unbind(1)
        return {
            name: base[name] + torch.tensordot(column, task_vectors[name], 1)
            for name, column in zip(base, columns, strict=True)
        }

    for step in range(12):
        optimizer.zero_grad()
        loss = objective(tensors(), step)
        torch.testing.assert_close(found.losses[step].float(), loss.detach(), rtol=1e-4, atol=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([raw], 1.0)
        optimizer.step()
    torch.testing.assert_close(found.coefficients, raw.detach(), rtol=1e-3, atol=1e-4)
    assert (found.coefficients < 0).any()
    for name, tensor in tensors().items():
        torch.testing.assert_close(merged[name], tensor.detach(), rtol=1e-3, atol=1e-3)


def test_nothing_learned_is_the_base() -> None:
    base, experts = models()
    assert all(torch.equal(x, base[name]) for name, x in learned_by(base, experts, steps=0)[0].items())


def test_coefficients_in_a_file(tmp_path: Path) -> None:
    base, experts = models()
    merged, found = learned_by(base, experts, steps=5)
    found.save(tmp_path / "learned.safetensors")
    loaded = Learned.load(tmp_path / "learned.safetensors")
    assert loaded.names == ["w", "b"]
    assert torch.equal(loaded.coefficients, found.coefficients) and torch.equal(loaded.losses, found.losses)
    for name, tensor in learned_by(base, experts, initial=loaded, steps=0)[0].items():
        assert_same(tensor, merged[name], name)
    other = {name.replace("b", "c"): x for name, x in base.items()}
    message = r"^initial must have been learned for the tensors of these models, got '[bc]'$"
    with pytest.raises(ValueError, match=message):
        learned_by(other, [{name.replace("b", "c"): x for name, x in e.items()} for e in experts], initial=loaded)
    message = "initial must be a number or have shape (2, 2), got (3, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        learned_by(base, experts[:2], initial=loaded)
    save_file({"coefficients": torch.ones(3, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"^path must be a file of learned coefficients, got "):
        Learned.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_groups_are_one_hot_masks(granularity: str) -> None:
    """aTLAS x K: the steps of eager PyTorch with as many masks as groups; tensors of one dimension take part."""
    base, experts = models()
    options: dict[str, Any] = {"groups": 3, "seed": 5, "granularity": granularity, "schedule": "cosine"}
    merged, found = learned_by(base, experts, steps=8, lr=0.05, **options)
    sizes = [x.numel() for x in base.values()]
    blocks = sizes if granularity == "layer" else [sum(sizes)]
    offsets = torch.tensor([0, *blocks]).cumsum(0)
    masks = torch.nn.functional.one_hot(groups_of(offsets, 3, 5), 3).float()  # [num_params, groups]
    flat = [torch.cat([model[name].flatten() for name in base]) for model in (base, *experts)]
    task_vectors = torch.stack(flat[1:]) - flat[0]
    raw = torch.zeros(3, len(blocks), 3, requires_grad=True)
    optimizer = torch.optim.AdamW([raw], lr=0.05, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)

    def tensors() -> StateDict:
        of_param = (raw.repeat_interleave(offsets.diff(), dim=1) * masks).sum(dim=2)
        parts = (flat[0] + (of_param * task_vectors).sum(dim=0)).split(sizes)
        return {name: part.view(base[name].shape) for name, part in zip(base, parts, strict=True)}

    for step in range(8):
        optimizer.zero_grad()
        loss = objective(tensors(), step)
        torch.testing.assert_close(found.losses[step].float(), loss.detach(), rtol=1e-4, atol=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([raw], 1.0)
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(found.coefficients, raw.detach(), rtol=1e-3, atol=1e-3)
    assert not torch.equal(merged["b"], base["b"])
    for name, tensor in tensors().items():
        torch.testing.assert_close(merged[name], tensor.detach(), rtol=1e-3, atol=1e-3)


def test_groups_in_a_file(tmp_path: Path) -> None:
    base, experts = models()
    merged, found = learned_by(base, experts, steps=3, groups=4, seed=9)
    assert found.coefficients.shape == (3, 2, 4) and found.seed == 9
    found.save(tmp_path / "learned.safetensors")
    loaded = Learned.load(tmp_path / "learned.safetensors")
    assert loaded.seed == 9 and loaded.mask_logits is None
    again, _ = learned_by(base, experts, steps=0, groups=4, seed=9, initial=loaded)
    for name, tensor in merged.items():
        assert_same(again[name], tensor, name)
    with pytest.raises(ValueError, match=r"^initial must have been learned with seed 8, got 9$"):
        learned_by(base, experts, steps=0, groups=4, seed=8, initial=loaded)
    message = "initial must be a number or have shape (3, 2), got (3, 2, 4)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        learned_by(base, experts, steps=0, initial=loaded)


def test_edges_of_groups() -> None:
    """One model, models that are all the same, and a task vector of zeros."""
    base, experts = models(1)
    ones, _ = learned_by(base, experts, groups=5, initial=1.0, steps=0)
    for name, x in experts[0].items():
        torch.testing.assert_close(ones[name], x)
    same, found = learned_by(base, [base, base], groups=5, steps=3, weight_decay=0)
    assert all(torch.equal(same[name], x) for name, x in base.items()) and not found.coefficients.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups must be in [1, 256], got 0"),
        ({"groups": 257}, "groups must be in [1, 256], got 257"),
        ({"schedule": "linear"}, "schedule must be one of 'constant', 'cosine', got 'linear'"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str) -> None:
    base, experts = models()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        learned_by(base, experts, **options)
