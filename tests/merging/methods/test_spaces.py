"""KnOTS and core space: against decompositions of dense task vectors in float64, FusionBench's alignment, by hand."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import merge_state_dicts
from surgery_kernels.merging import LowRank, merge_loras

pytestmark = pytest.mark.any_isa

ROWS, COLUMNS = 20, 14


def loras(count: int = 3, rank: int = 2, dtype: torch.dtype = torch.float64) -> list[dict[str, LowRank]]:
    generator = torch.Generator().manual_seed(0)

    def one() -> LowRank:
        up, down = (torch.randn(shape, dtype=dtype, generator=generator) for shape in ((ROWS, rank), (rank, COLUMNS)))
        return LowRank(up, down)

    return [{"a": one(), "b": one()} for _ in range(count)]


def ties(rows: list[Tensor], density: float) -> Tensor:
    """The mean of what agrees, of the largest entries of each.  # [d] each"""
    x = torch.stack(rows)
    lowest = x.shape[1] - int(density * x.shape[1])
    kept = x * (x.abs() >= x.abs().kthvalue(lowest, dim=1, keepdim=True).values)
    sign = kept.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    agreeing = kept * (kept.sign() == sign)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def merged_by_ties(blocks: dict[str, list[Tensor]], density: float) -> dict[str, Tensor]:
    """All matrices of an expert as one vector."""
    count = len(next(iter(blocks.values())))
    flat = ties([torch.cat([of[t].flatten() for of in blocks.values()]) for t in range(count)], density)
    parts = flat.split([of[0].numel() for of in blocks.values()])
    return {name: part.view_as(of[0]) for (name, of), part in zip(blocks.items(), parts, strict=True)}


def knots(experts: list[dict[str, Tensor]], density: float) -> dict[str, Tensor]:
    lefts, blocks = {}, {}
    for name in experts[0]:
        u, s, v = torch.linalg.svd(torch.cat([expert[name] for expert in experts], 1), full_matrices=False)
        kept = s > 1e-5
        lefts[name] = u[:, kept]
        blocks[name] = list((s[kept, None] * v[kept]).split(experts[0][name].shape[1], 1))
    return {name: lefts[name] @ block for name, block in merged_by_ties(blocks, density).items()}


def core(experts: list[dict[str, LowRank]], density: float) -> dict[str, Tensor]:
    sides, blocks = {}, {}
    for name in experts[0]:
        left = torch.linalg.svd(torch.cat([expert[name].up for expert in experts], 1), full_matrices=False)[0]
        right = torch.linalg.svd(torch.cat([expert[name].down for expert in experts]), full_matrices=False)[2]
        sides[name] = left, right
        blocks[name] = [left.T @ expert[name].up @ expert[name].down @ right.T for expert in experts]
    return {name: sides[name][0] @ block @ sides[name][1] for name, block in merged_by_ties(blocks, density).items()}


def dense(experts: list[dict[str, LowRank]]) -> list[dict[str, Tensor]]:
    return [{name: factors.product for name, factors in expert.items()} for expert in experts]


def test_knots_is_ties_of_the_aligned_blocks_from_factors_and_from_matrices() -> None:
    experts = loras()
    expected = knots(dense(experts), 0.4)
    base = {name: torch.randn(ROWS, COLUMNS, dtype=torch.float64) for name in expected}
    models = [{name: base[name] + vector for name, vector in expert.items()} for expert in dense(experts)]
    from_factors = merge_loras(experts, density=0.4)
    from_matrices = merge_state_dicts(base, models, method="knots", density=0.4)
    for name, change in expected.items():
        assert from_factors[name].rank == 6
        torch.testing.assert_close(from_factors[name].product, change, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(from_matrices[name], base[name] + change, rtol=1e-9, atol=1e-9)


def test_core_space_is_ties_of_the_cores() -> None:
    experts = loras()
    expected = core(experts, 0.4)
    for name, factors in merge_loras(experts, method="core_space", density=0.4).items():
        assert (factors.up.shape, factors.down.shape) == ((ROWS, 6), (6, COLUMNS))
        torch.testing.assert_close(factors.product, expected[name], rtol=1e-9, atol=1e-9)


def test_core_space_of_matrices_is_that_of_their_singular_vectors() -> None:
    experts = dense(loras())
    base = {name: torch.zeros(ROWS, COLUMNS, dtype=torch.float64) for name in experts[0]}
    factors = []
    for expert in experts:
        parts = {name: torch.linalg.svd(vector, full_matrices=False) for name, vector in expert.items()}
        pairs = {name: (u[:, :2] * s[:2].sqrt(), s[:2, None].sqrt() * v[:2]) for name, (u, s, v) in parts.items()}
        factors.append({name: LowRank(*pair) for name, pair in pairs.items()})
    expected = merge_loras(factors, method="core_space", density=0.4)
    for name, tensor in merge_state_dicts(base, experts, method="core_space", density=0.4).items():
        torch.testing.assert_close(tensor, expected[name].product, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["knots", "core_space"])
def test_what_is_linear_stays_as_it_is(method: str) -> None:
    """The rotation loses nothing: a weighted sum is the sum, of ranks of its own and over transposed weights too."""
    experts = loras()
    experts[1]["a"] = LowRank(torch.ones(ROWS, 5).double(), torch.ones(5, COLUMNS).double())
    del experts[2]["b"]
    experts = [{name: LowRank(one.up, one.down, name == "a") for name, one in expert.items()} for expert in experts]
    merged = merge_loras(experts, method=method, inner="task_arithmetic", weights=[1, 2, 0.5], lam=0.3)
    weighted = list(zip(experts, [1, 2, 0.5], strict=True))
    for name, shape in (("a", (COLUMNS, ROWS)), ("b", (ROWS, COLUMNS))):
        expected = sum(0.3 * w * expert[name].product for expert, w in weighted if name in expert)
        assert merged[name].product.shape == shape
        torch.testing.assert_close(merged[name].product, expected, rtol=1e-9, atol=1e-9)


def test_by_hand() -> None:
    """U = e1, blocks (3, 0) and (0, 4)."""
    up = torch.tensor([[1.0], [0]])
    experts = [{"w": LowRank(3 * up, torch.tensor([[1.0, 0]]))}, {"w": LowRank(up, torch.tensor([[0.0, 4]]))}]
    for method in ("knots", "core_space"):
        merged = merge_loras(experts, method=method, density=1.0)["w"]
        assert merged.rank == 1 or method == "core_space"
        torch.testing.assert_close(merged.product, torch.tensor([[3.0, 4], [0, 0]]))


def test_tsv_is_the_same_in_core_space() -> None:
    """With as many slots: 3 experts of rank 2 have 6 there."""
    experts = [{"a": expert["a"]} for expert in loras()]
    parts = [torch.linalg.svd(expert["a"], full_matrices=False) for expert in dense(experts)]
    polars = []
    for side in (torch.cat([u[:, :2] for u, _, _ in parts], 1), torch.cat([v[:2] for _, _, v in parts])):
        u, _, v = torch.linalg.svd(side, full_matrices=False)
        polars.append(u @ v)
    expected = polars[0] @ torch.diag(torch.cat([s[:2] for _, s, _ in parts])) @ polars[1]
    merged = merge_loras(experts, method="core_space", inner="tsv_m")["a"]
    torch.testing.assert_close(merged.product, expected, rtol=1e-7, atol=1e-7)


def test_scope_decides_over_which_weights() -> None:
    experts = loras()
    for expert in experts:
        expert["b"] = LowRank(100 * expert["b"].up, expert["b"].down)
    together, apart = (merge_loras(experts, scope=scope, density=0.5) for scope in ("model", "tensor"))
    alone = merge_loras([{"a": expert["a"]} for expert in experts], density=0.5)
    torch.testing.assert_close(apart["a"].product, alone["a"].product)
    assert together["a"].product.norm() < 0.9 * alone["a"].product.norm()


def test_rank() -> None:
    experts = loras()
    whole, most = merge_loras(experts, density=0.4)["a"], merge_loras(experts, density=0.4, rank=3)["a"]
    u, s, v = torch.linalg.svd(whole.product, full_matrices=False)
    assert most.rank == 3
    torch.testing.assert_close(most.product, u[:, :3] * s[:3] @ v[:3], rtol=1e-9, atol=1e-9)


def test_signs_follow_the_largest_entry() -> None:
    left = merge_loras(loras())["a"].up
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", [(4, 90), (90, 4)], ids=str)
def test_shapes_and_what_is_no_matrix(shape: tuple[int, int]) -> None:
    """Also more rows than all columns together; a vector is merged as it is, a kernel by its rows."""
    generator = torch.Generator().manual_seed(1)
    base = {"w": torch.zeros(shape), "v": torch.zeros(9), "k": torch.zeros(3, 2, 2)}
    experts = [{k: torch.randn(x.shape, generator=generator) for k, x in base.items()} for _ in range(3)]
    wide = [{k: x.double() for k, x in state.items()} for state in (base, *experts)]
    merged = merge_state_dicts(base, experts, method="knots", scope="tensor", density=0.4)
    for name in ("w", "k"):
        expected = knots([{name: expert[name].flatten(1)} for expert in wide[1:]], 0.4)[name]
        torch.testing.assert_close(merged[name].double().flatten(1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged["v"].double(), ties([expert["v"] for expert in wide[1:]], 0.4))


def test_against_fusion_bench() -> None:
    """Its helper aligns, at another threshold; it has no merge."""
    pytest.importorskip("fusion_bench", reason="fusion-bench is not installed", exc_type=ImportError)
    from fusion_bench.method.knots.knots_utils import subspace_alignment

    from surgery_kernels.merging.methods.spectral.spaces import knots_of_factors

    experts = [expert["a"] for expert in loras()]
    u, s, rights = subspace_alignment([expert.product for expert in experts])
    space = knots_of_factors(experts, 1e-4)
    signs = (u * space.left).sum(0).sign()
    torch.testing.assert_close(space.left * signs, u)
    for block, right in zip(space.blocks, rights, strict=True):
        torch.testing.assert_close(signs[:, None] * block, s[:, None] * right)


def test_not_finite() -> None:
    experts = loras(2)
    experts[1]["a"].up[3, 1] = math.nan
    message = "^experts\\[1\\] must be finite, got NaN or infinity in the factors of 'a'$"
    with pytest.raises(RuntimeError, match=message):
        merge_loras(experts)
    merged = merge_loras(experts, nonfinite="drop", inner="task_arithmetic")["a"].product
    experts[1]["a"].up[3] = 0
    torch.testing.assert_close(merged, sum(expert["a"].product for expert in experts))


FACTORS = LowRank(torch.ones(3, 1), torch.ones(1, 2))
WRONG: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    ([], {}, ValueError, "experts must be at least one LoRA, got none"),
    ([{}], {"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    ([{}], {"method": "ties"}, ValueError, "method must be one of 'knots', 'core_space', got 'ties'"),
    ([{}], {"inner": "karcher"}, ValueError, "inner must be one of "),
    ([{}], {"inner": "magmax", "density": 0.5}, ValueError, "density must be left out where inner is 'magmax', got"),
    ([{}], {"options": {"rows": 2}}, ValueError, "rows must be left out where inner is 'ties', got 2"),
    (
        [{"w": FACTORS}, {"w": LowRank(torch.ones(2, 1), torch.ones(1, 2))}],
        {},
        ValueError,
        "experts[1]['w'] must be like the others, (3, 2) of torch.float32, got (2, 2) of torch.float32",
    ),
]


@pytest.mark.parametrize(("experts", "options", "error", "message"), WRONG, ids=[row[3] for row in WRONG])
def test_errors(experts: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        merge_loras(experts, **options)


def test_factors_must_fit() -> None:
    message = "up and down must be [outputs, rank] and [rank, inputs], got (3, 2) and (1, 2)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LowRank(torch.ones(3, 2), torch.ones(1, 2))
