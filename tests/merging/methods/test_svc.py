"""SVC against its formula in float64, by hand, and against FusionBench."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts

pytestmark = pytest.mark.any_isa


def svc(base: Tensor, merged: Tensor, experts: list[Tensor], least: float) -> Tensor:
    change = merged - base
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    response, own = u.T @ change, torch.stack([u.T @ (expert - base) for expert in experts])
    shares = (response * own).sum(-1) / own.square().sum(-1).clamp(min=1e-12)
    return base + u * (len(experts) / shares.clamp(min=least).sum(0) * s) @ v


def models(shape: tuple[int, ...] = (12, 20), count: int = 3) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, dtype=torch.float64, generator=generator)
    common = torch.randn(shape, dtype=torch.float64, generator=generator)
    noise = [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]
    return base, [base + 0.1 * common + 0.1 * x for x in noise]


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("least", [1.0, 0.3])
def test_formula(shape: tuple[int, int], least: float) -> None:
    base, experts = models(shape)
    for inner, options in (("task_arithmetic", {"lam": 0.8}), ("ties", {"density": 0.5}), ("tsv_m", {})):
        states = {"w": base}, [{"w": expert} for expert in experts]
        merged = merge_state_dicts(*states, method=inner, **options)["w"]
        expected = svc(base, merged, experts, least)
        given = {"inner": inner, "least": least, **options}
        actual = merge_state_dicts(*states, method="svc", **given)["w"]
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
        of_merged = merge_state_dicts(*states, method="svc", merged={"w": merged}, least=least)["w"]
        torch.testing.assert_close(of_merged, expected, rtol=1e-8, atol=1e-9)
        assert (expected - merged).norm() > 0.01


def test_by_hand() -> None:
    base = torch.zeros(2, 2)
    experts = [{"w": torch.diag(torch.tensor(values))} for values in ([2.0, 1.0], [2.0, 4.0])]
    merged = merge_state_dicts({"w": base}, experts, method="svc")["w"]
    torch.testing.assert_close(merged, torch.diag(torch.tensor([2.0, 1.6])))


def test_edges() -> None:
    """One expert is the result, equal ones count once, and vectors are what the other method makes of them."""
    base, (expert, *_) = models()
    for count in (1, 4):
        merged = merge_state_dicts({"w": base}, [{"w": expert}] * count, method="svc")["w"]
        torch.testing.assert_close(merged, expert, rtol=1e-8, atol=1e-9)
    thin = [base + torch.outer(base[:, 0], base[t]) for t in range(2)]  # rank 1
    several = merge_state_dicts({"w": base}, [{"w": x} for x in (*thin, base)], method="svc")["w"]
    torch.testing.assert_close(several, svc(base, base + sum(x - base for x in thin), [*thin, base], 1.0))
    states = [{"w": x, "v": x[0]} for x in (base, expert)]
    assert torch.equal(merge_state_dicts(states[0], states[1:], method="svc", lam=2)["v"], 2 * expert[0] - base[0])


def test_rounded_once() -> None:
    base, *experts = (tensor.bfloat16() for tensor in (models()[0], *models()[1]))
    wide = [{"w": tensor.double()} for tensor in (base, *experts)]
    expected = merge_state_dicts(wide[0], wide[1:], method="svc")["w"]
    actual = merge_state_dicts({"w": base}, [{"w": expert} for expert in experts], method="svc")["w"]
    assert (actual == expected.bfloat16()).double().mean() > 0.99


def test_errors() -> None:
    base, experts = models()
    with pytest.raises(ValueError, match=r"^merged must have the names of base, got no 'w'$"):
        merge_state_dicts({"w": base}, [{"w": expert} for expert in experts], method="svc", merged={})


def test_against_fusion_bench() -> None:
    pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
    from fusion_bench.method.singular_value_calibration import utils

    base, experts = models()
    merged = sum(experts) - 2 * base
    theirs = utils.subspace_consistency_spectral_calibration_accelerated(base, experts, merged, alpha=0.5)
    ours = merge_state_dicts({"w": base}, [{"w": expert} for expert in experts], method="svc", least=0.5)["w"]
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
