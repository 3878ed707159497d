"""PCB-Merging against plain formulas in float64, and by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.checkpoint import merge
from surgery_kernels.ops.weighted_merge import INTER
from tests.cases import DTYPES, assert_same, gaussian, generator, inputs, option_id, rising
from tests.llama_checkpoints import gaussians, loaded, models, save

pytestmark = pytest.mark.any_isa

SHAPES = {"matrix": (90, 70), "vector": (631,), "scalar": (), "empty": (0, 3)}


def clamped(x: Tensor, low: float, high: float) -> Tensor:
    ordered, d = x.sort(dim=1).values, x.shape[1]
    first, last = ordered[:, int(d * low)], ordered[:, max(0, int(d * (1 - high) - 1))]
    return x.clamp(first[:, None], last[:, None])


def spread(x: Tensor) -> Tensor:
    """To [0, 1]; 0 where all are the same."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    return ((x - low) / (high - low)).nan_to_num(0)


def formula(x: Tensor, density: float, inter: str = "paper", clip: float = 0.01) -> Tensor:
    """The merged task vector, as the authors' scripts have it.  # x: [num_tasks, num_params]"""
    magnitudes = clamped(x.abs(), clip, clip)
    norms = spread(magnitudes)
    signed = x.sign() * norms
    if inter == "paper":
        agreement = torch.stack([torch.tanh(s * signed).sum(0) for s in signed])
    else:
        agreement = torch.tanh(x * (signed if inter == "half" else x).sum(0))
    scores = torch.exp(len(x) * norms**2) * agreement
    weights = spread(scores.maximum(scores.sort(dim=1).values[:, int(x.shape[1] * (1 - density))][:, None]))
    return (weights * x.sign() * magnitudes).sum(0) / weights.sum(0).clamp(min=1e-12)


def change(x: Tensor, **options: Any) -> Tensor:
    base = {"w": torch.zeros_like(x[0])}
    return merge_state_dicts(base, [{"w": row} for row in x], method="pcb", **options)["w"]


def test_by_hand() -> None:
    two = torch.tensor([[4.0, -2, 0, 1, 3], [-4, 2, 1, 1, 0]], dtype=torch.float64)
    assert change(two, clip=0, density=0.4).tolist() == pytest.approx([0, 0, 0, 1, 3])
    three = torch.tensor([[3, -1, 2, 0.5, 0, 1], [1, 2, 2, -0.5, 1, 0], [2, 1, -4, 0.5, 0, 0]], dtype=torch.float64)
    assert change(three, clip=0, density=0.5).tolist() == pytest.approx([2.5, 1.883520, 2, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("inter", INTER)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
def test_the_formula(num_tasks: int, inter: str) -> None:
    for kind, scale, density, clip in (
        *((gaussian, 1.0, 0.05, 0.01), (gaussian, 1e-3, 0.3, 0.0001), (gaussian, 1.0, 0.97, 0.2)),
        (rising, 1.0, 0.3, 0.01),
    ):
        base, experts = inputs(kind, 20_000, num_tasks, torch.float64)
        x = torch.stack([expert - base for expert in experts]) * scale
        actual = change(x, density=density, clip=clip, inter=inter)
        torch.testing.assert_close(actual, formula(x, density, inter, clip), rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=option_id)
def test_other_dtypes(dtype: torch.dtype) -> None:
    states = {name: inputs(gaussian, shape, 4, dtype) for name, shape in SHAPES.items()}
    base = {name: of for name, (of, _) in states.items()}
    experts = [{name: of[t] for name, (_, of) in states.items()} for t in range(4)]
    merged = merge_state_dicts(base, experts, method="pcb", density=0.2)
    pairs = [[(expert[name].double() - base[name].double()).reshape(-1) for name in base] for expert in experts]
    expected = formula(torch.stack([torch.cat(parts) for parts in pairs]), 0.2)
    for name, part in zip(base, expected.split([base[name].numel() for name in base]), strict=True):
        exact = base[name].double().reshape(-1) + part
        far = (merged[name].double().reshape(-1) - exact).abs() > torch.finfo(dtype).eps * exact.abs() + 2e-6
        assert far.sum() <= (0.001 if dtype.itemsize > 2 else 0.05) * far.numel()


def test_experts_without_a_spread_have_no_weight() -> None:
    x = torch.randn(3, 500, generator=generator("pcb"), dtype=torch.float64)
    for row in (torch.zeros(500), torch.full((500,), 0.5), torch.tensor([0.5, -0.5]).repeat(250)):
        with_it = torch.cat([x, row[None].double()])
        assert change(with_it).isfinite().all()
        torch.testing.assert_close(change(with_it), formula(with_it, 0.05))
    assert torch.equal(change(torch.zeros(2, 500)), torch.zeros(500))
    assert torch.equal(change(torch.ones(2, 1)), torch.zeros(1))


def test_factors_of_the_experts() -> None:
    x = torch.randn(3, 500, generator=generator("pcb"), dtype=torch.float64)
    doubled = change(x, weights=[2.0, 2.0, 2.0])
    torch.testing.assert_close(doubled, change(x, lam=2.0))
    torch.testing.assert_close(doubled, 2 * change(x))
    only = change(x, weights=[1.0, 0.0, 0.0]) + change(x, weights=[0.0, 1.0, 1.0])
    torch.testing.assert_close(only, change(x))


def test_the_scale_of_changes_does_not_matter() -> None:
    x = torch.randn(3, 5_000, generator=generator("pcb"), dtype=torch.float64)
    assert_same(change(1024 * x), 1024 * change(x))
    assert not torch.allclose(change(1024 * x, inter="raw"), 1024 * change(x, inter="raw"))


def test_from_disk(tmp_path: Path) -> None:
    state_dicts = models(gaussians, torch.bfloat16)
    folders = save(tmp_path, state_dicts)
    given: dict[str, Any] = {
        "merge_method": "pcb",
        "base_model": folders[0],
        "models": [{"model": folder} for folder in folders[1:4]],
        "parameters": {"density": 0.2, "lambda": 1.2},
    }
    base, *experts = ({key: state[key] for key in sorted(state)} for state in state_dicts[:4])
    for scope in ("model", "tensor"):
        merge(given | ({"scope": scope} if scope == "tensor" else {}), tmp_path / scope)
        expected = merge_state_dicts(base, experts, method="pcb", scope=scope, density=0.2, lam=1.2)
        for key, tensor in loaded(tmp_path / scope).items():
            assert_same(tensor, expected[key], f"{scope}, {key}")
