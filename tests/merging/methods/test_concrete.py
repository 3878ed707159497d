"""Concrete task arithmetic and AdaMerging against eager PyTorch; FusionBench's are in integrations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts, reference
from surgery_kernels.merging import Learned
from surgery_kernels.reference.combine import mask_of
from tests.cases import assert_same, gaussian, inputs

pytestmark = pytest.mark.any_isa

StateDict = dict[str, Tensor]
SHAPES: dict[str, tuple[int, ...]] = {"w": (9, 7), "b": (5,), "scale": ()}
METHODS = ("concrete_task_arithmetic", "concrete_adamerging")


def models(num_tasks: int = 3, dtype: torch.dtype = torch.float32) -> tuple[StateDict, list[StateDict]]:
    drawn = {name: inputs(gaussian, shape, num_tasks, dtype) for name, shape in SHAPES.items()}
    return {name: base for name, (base, _) in drawn.items()}, [
        {name: experts[t] for name, (_, experts) in drawn.items()} for t in range(num_tasks)
    ]


def objective(tensors: StateDict, step: int) -> Tensor:
    return sum(((x.float() - 0.3 * (1 + step % 2)) ** 2).sum() for x in tensors.values())


def learned_by(base: StateDict, experts: list[StateDict], method: str, **options: Any) -> tuple[StateDict, Learned]:
    found: list[Learned] = []
    defaults: dict[str, Any] = {"objective": objective, "receive": found.append, "steps": 3, "lr": 0.05}
    if method == "concrete_adamerging":
        defaults["adamerging_steps"] = 2
    return merge_state_dicts(base, experts, method=method, **{**defaults, **options}), found[0]


def flat(model: StateDict) -> Tensor:
    return torch.cat([x.flatten() for x in model.values()])


def masked(base: StateDict, experts: list[StateDict], lam: float, logits: Tensor, **noise: Any) -> Tensor:
    offsets = torch.tensor([0, *(x.numel() for x in base.values())]).cumsum(0)
    task_vectors = torch.stack([flat(expert) for expert in experts]) - flat(base)
    coefficients = torch.full((len(experts), len(base)), lam)
    return reference.combine(flat(base), task_vectors, coefficients, offsets, mask_logits=logits, **noise)


def test_the_steps_of_eager_pytorch() -> None:
    """With masks of the oracle under seed * 2**32 + step, whose derivative is written out."""
    base, experts = models()
    merged, found = learned_by(base, experts, "concrete_task_arithmetic", steps=6, lam=0.4, seed=3)
    sizes = [x.numel() for x in base.values()]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    total = 0.4 * (torch.stack([flat(expert) for expert in experts]) - flat(base)).sum(dim=0)
    logits = torch.zeros(sum(sizes), requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(6):
        values = mask_of(logits.detach(), offsets, 0.5, 3 * 2**32 + step)
        mask = values + (logits - logits.detach()) * (values * (1 - values) / 0.5)
        means = torch.stack([part.mean() for part in mask.split(sizes)]).repeat_interleave(offsets.diff())
        parts = (flat(base) + mask / means * total).split(sizes)
        loss = objective({name: x.view(SHAPES[name]) for name, x in zip(base, parts, strict=True)}, step)
        torch.testing.assert_close(found.losses[step].float(), loss.detach(), rtol=1e-4, atol=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert found.mask_logits is not None and found.seed == 3
    assert found.mask_logits[-1] == 0  # of a tensor of one entry, to autograd's noise
    torch.testing.assert_close(found.mask_logits[:-1], logits.detach()[:-1], rtol=1e-3, atol=1e-3)
    assert_same(flat(merged), masked(base, experts, 0.4, found.mask_logits, seed=3 * 2**32 + 6))


@pytest.mark.parametrize(
    ("mask", "noise"),
    [
        ("continuous", {"temperature": 0.7, "seed": 3}),
        ("discrete", {"temperature": 0, "seed": 3}),
        ("probabilities", {"temperature": 1, "seed": None}),
        ("hard", {"temperature": 0, "seed": None}),
    ],
)
def test_the_mask_of_the_result(mask: str, noise: dict[str, Any]) -> None:
    base, experts = models()
    merged, found = learned_by(base, experts, "concrete_task_arithmetic", mask=mask, temperature=0.7)
    assert_same(flat(merged), masked(base, experts, 0.3, found.mask_logits, **noise))
    of_adamerging, _ = learned_by(
        base, experts, "concrete_adamerging", mask=mask, temperature=0.7, initial=of_lam(found), steps=3,
        adamerging_steps=0, lr=1e-30,
    )  # fmt: skip
    for name, tensor in of_adamerging.items():  # its task vectors are masked, and rounded, first
        torch.testing.assert_close(tensor, merged[name])


def of_lam(found: Learned) -> Learned:
    return Learned(
        found.names, found.coefficients.expand(-1, len(found.names)).contiguous(), found.losses, found.mask_logits
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method: str) -> None:
    base, experts = models()
    options = {"inner_lr": 0.1} if method == "concrete_adamerging" else {}
    _, found = learned_by(base, experts, method, steps=40, **options)
    losses = found.losses[:40:2]
    assert losses[-5:].mean() < losses[:5].mean()


@pytest.mark.parametrize("method", METHODS)
def test_learned_in_a_file(method: str, tmp_path: Path) -> None:
    base, experts = models()
    options: dict[str, Any] = {"mask": "probabilities"}
    merged, found = learned_by(base, experts, method, **options)
    found.save(tmp_path / "learned.safetensors")
    loaded = Learned.load(tmp_path / "learned.safetensors")
    assert torch.equal(loaded.mask_logits, found.mask_logits) and torch.equal(loaded.coefficients, found.coefficients)
    if method == "concrete_adamerging":
        assert found.coefficients.shape == (3, 3) and len(found.losses) == 5
        options["adamerging_steps"] = 0
    again, _ = learned_by(base, experts, method, initial=loaded, **{**options, "steps": 0})
    for name, tensor in merged.items():
        assert_same(again[name], tensor, name)
    with pytest.raises(
        ValueError, match=r"^initial must have been learned for the tensors of these models, got 'scale'$"
    ):
        learned_by(
            {"w": base["w"], "b": base["b"]}, [{"w": e["w"], "b": e["b"]} for e in experts], method, initial=loaded
        )
    without = Learned(found.names, found.coefficients, found.losses)
    with pytest.raises(ValueError, match=r"^initial must have 69 mask_logits, got none or others$"):
        learned_by(base, experts, method, initial=without)
    if method == "concrete_adamerging":
        message = "initial must have coefficients of shape (3, 1), got (3, 3)"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            learned_by(base, experts, method, initial=loaded, granularity="task")


@pytest.mark.parametrize("method", METHODS)
def test_edges(method: str) -> None:
    """One model, models that are all the same, tensors of one entry, 16 bits, no gradients outside."""
    base, experts = models(1)
    merged, _ = learned_by(
        base, experts, method, lam=1.0, **({"adamerging_steps": 0} if method == "concrete_adamerging" else {})
    )
    torch.testing.assert_close(merged["scale"], experts[0]["scale"])
    same, found = learned_by(base, [base, base], method)
    assert all(torch.equal(same[name], x) for name, x in base.items()) and not found.mask_logits.any()
    base, experts = models(2, torch.bfloat16)
    expected, _ = learned_by(base, experts, method)
    with torch.inference_mode():
        merged, _ = learned_by(base, experts, method)
    for name, tensor in expected.items():
        assert tensor.dtype == torch.bfloat16
        assert_same(merged[name], tensor, name)
    assert merge_state_dicts({}, [{}], method=method, objective=objective) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": None}, "objective must be callable, got NoneType"),
        ({"receive": 3}, "receive must be callable or None, got int"),
        ({"initial": "0"}, "initial must be a number or what was learned, got str"),
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0.0"),
        ({"mask": "soft"}, "mask must be one of 'continuous', 'discrete', 'probabilities', 'hard', got 'soft'"),
        ({"seed": -1}, "seed must be in [0, 2.14748e+09], got -1"),
        ({"steps": -1}, "steps must be finite and 0 or greater, got -1"),
        (
            {"objective": lambda merged, step: 1.0},
            "objective must return a scalar tensor that depends on the merged ones, got 1.0",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused(options: dict[str, Any], message: str) -> None:
    base, experts = models()
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        learned_by(base, experts, "concrete_adamerging", **{"receive": lambda learned: None, **options})
