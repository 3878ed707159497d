"""DOGE against its loss by autograd in float64, and against FusionBench."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import merge_state_dicts

pytestmark = pytest.mark.any_isa

LAM, STEPS = 0.07, 20


def left(x: Tensor, k: int) -> Tensor:
    return torch.linalg.svd(x, full_matrices=False)[0][:, :k]


def change(vectors: list[Tensor]) -> Tensor:
    """Expert after expert, by autograd."""
    rank, count = min(vectors[0].shape), len(vectors)
    common = left(torch.cat([left(v, rank // count) for v in vectors], 1), rank // 6)
    scales = [LAM / v.norm() for v in vectors]
    moved = torch.zeros_like(vectors[0], requires_grad=True)
    optimizer = torch.optim.Adam([moved], lr=1e-4)
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = sum(scale * (v + moved) for scale, v in zip(scales, vectors, strict=True))
        sum(((v * (v - total)).sum(1) ** 2).sum() for v in vectors).backward()
        moved.grad -= common @ (common.T @ moved.grad)
        optimizer.step()
    return moved.detach()


def doge(base: dict[str, Tensor], experts: list[dict[str, Tensor]], density: float, trim: str) -> dict[str, Tensor]:
    vectors = [{name: expert[name] - base[name] for name in base} for expert in experts]
    changes = {name: change([of[name] for of in vectors]) for name in base}
    merged = dict(base)
    for of in vectors:
        moved = {name: of[name] + changes[name] for name in base}
        ranked = of if trim == "before" else moved
        sizes = torch.cat([ranked[name].abs().flatten() for name in base])
        threshold = sizes.kthvalue(len(sizes) - int(density * len(sizes))).values
        for name in base:
            kept = moved[name] * (ranked[name].abs() >= threshold)
            merged[name] = merged[name] + LAM / of[name].norm() * kept
    return merged


def models(count: int = 3) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (12, 20), "b": (18, 12)}
    drawn = [
        {k: torch.randn(s, dtype=torch.float64, generator=generator) for k, s in shapes.items()}
        for _ in range(count + 1)
    ]
    return drawn[0], [{k: drawn[0][k] + 0.1 * x for k, x in expert.items()} for expert in drawn[1:]]


@pytest.mark.parametrize("trim", ["before", "after"])
def test_formula(trim: str) -> None:
    base, experts = models()
    expected = doge(base, experts, 0.3, trim)
    actual = merge_state_dicts(base, experts, method="doge", steps=STEPS, trim=trim)
    for name in base:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-10)
        assert (actual[name] - base[name]).norm() > 0.01


def test_what_is_left_alone_and_what_takes_no_part() -> None:
    base, experts = models()
    vectors = {"bias": torch.ones(5, dtype=torch.float64)}
    merged = merge_state_dicts(
        {**base, **vectors},
        [{**expert, "bias": 2 * vectors["bias"]} for expert in experts],
        method="doge",
        steps=3,
        exclude=["b"],
    )
    assert torch.equal(merged["bias"], vectors["bias"]) and torch.equal(merged["b"], base["b"])
    alone = merge_state_dicts({"a": base["a"]}, [{"a": expert["a"]} for expert in experts], method="doge", steps=3)
    torch.testing.assert_close(merged["a"], alone["a"])
    same = {"a": base["a"]}
    several = merge_state_dicts(same, [same, {"a": experts[0]["a"]}, same], method="doge", steps=3)["a"]
    assert several.isfinite().all() and (several - base["a"]).norm() > 0.01
    assert torch.equal(merge_state_dicts(same, [same], method="doge", steps=3)["a"], base["a"])


def test_more_experts_than_rank_and_one() -> None:
    base, experts = models(30)
    for chosen in (experts, experts[:1]):
        merged = merge_state_dicts(base, chosen, method="doge", steps=3)
        assert all((merged[name] - base[name]).norm() > 0.01 for name in base)


def test_against_fusion_bench(capsys: pytest.CaptureFixture[str]) -> None:
    """It merges what is called an encoder's weight. Of an expert that changed nothing it makes NaN, ours leaves it out;
    of more experts than ranks it takes no directions, ours one of each."""
    pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
    from fusion_bench.method.doge_ta.doge_ta import DOGE_TA_Algorithm

    base, experts = models()

    def module(state: dict[str, Tensor]) -> nn.Module:
        model = nn.ModuleDict({"encoder": nn.ModuleDict({k: nn.Linear(1, 1, bias=False) for k in state})})
        for name, tensor in state.items():
            model["encoder"][name].weight = nn.Parameter(tensor.float().clone())
        return model

    pool = {"_pretrained_": module(base), **{f"expert{t}": module(expert) for t, expert in enumerate(experts)}}
    theirs = DOGE_TA_Algorithm(subspace=6, K=30, lamda=LAM).run(pool).state_dict()
    states = [{f"encoder.{k}.weight": x.float() for k, x in state.items()} for state in (base, *experts)]
    ours = merge_state_dicts(states[0], states[1:], method="doge")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2e-5)
        assert (tensor - states[0][name]).norm() > 0.01
    capsys.readouterr()  # it prints
