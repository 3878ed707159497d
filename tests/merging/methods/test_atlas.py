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
