"""Weighted means against the oracle: importance that is given, and PCB's scores, their limits and their merge."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, pcb_merge, reference, weighted_merge
from surgery_kernels.ops.weighted_merge import INTER, Scored
from tests.cases import (
    DTYPES,
    KINDS,
    NOT_FINITE,
    NUM_TASKS,
    SHAPES,
    assert_same,
    bits,
    gaussian,
    generator,
    grid,
    inputs,
    laid_out,
    not_finite,
    option_id,
)

ops = torch.ops.surgery_kernels

WEIGHTS = [0.5, 1.0, 0.0, 2.0]


def importance_of(experts: list[Tensor], *seed: Any, wide: bool = False) -> list[Tensor]:
    """Half of it 0, and of any size."""
    g = generator("importance", *seed)
    dtype = torch.promote_types(experts[0].dtype, torch.float32) if wide else experts[0].dtype
    draw = [torch.randn(x.shape, generator=g, dtype=torch.float64).clamp(min=0) ** 3 for x in experts]
    return [x.to(dtype) for x in draw]


def check(base: Tensor | None, experts: list[Tensor], importance: list[Tensor], **options: Any) -> None:
    merged = weighted_merge(base, experts, importance, **options)
    assert_same(merged, reference.weighted_merge(base, experts, importance, **options), str(options))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype) -> None:
    base, experts = inputs(kind, 257, 4, dtype)
    for wide in (False, True):
        importance = importance_of(experts, kind.__name__, wide=wide)
        check(base, experts, importance, weights=WEIGHTS)
        check(None, experts, importance, floor=0.25)
        check(base, experts, importance, floor=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, shape, 3, dtype)
    check(base, experts, importance_of(experts, shape))
    check(None, experts, importance_of(experts, shape, wide=True))
    for inter in INTER if base.numel() < 1_000 else INTER[:1]:
        check_scored([base], [experts], inter, [0.05, 0.5, 1.0])


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int) -> None:
    base, experts = inputs(gaussian, 500, num_tasks, torch.float32)
    check(base, experts, importance_of(experts, num_tasks))
    check_scored([base], [experts], "paper", [0.1] * num_tasks)


@pytest.mark.parametrize("layout", ["transposed", "strided", "shifted"])
def test_every_layout(layout: str) -> None:
    base, experts = inputs(gaussian, (12, 21), 3, torch.bfloat16)
    importance = importance_of(experts, layout, wide=True)
    moved = [laid_out(x, layout) for x in (base, *experts)]
    out = laid_out(torch.zeros_like(base), layout)
    given = [laid_out(x, layout) for x in importance]
    assert weighted_merge(moved[0], moved[1:], given, out=out) is out
    assert_same(out, reference.weighted_merge(base, experts, importance))
    assert_same(pcb_merge(moved[0], moved[1:], density=0.3, out=out), pcb_merge(base, experts, density=0.3))


def numbers_of(base: list[Tensor], experts: list[list[Tensor]], clip: float = 0.01) -> tuple[Tensor, Tensor]:
    """The task vectors of the scope in the widest compute type, [num_tasks, num_params]; and what they are clipped to,
    by sorting."""
    wide = torch.promote_types(base[0].dtype, torch.float32)
    pairs = list(zip(base, experts, strict=True))
    x = torch.stack(
        [torch.cat([(of[t].to(wide) - b.to(wide)).reshape(-1) for b, of in pairs]) for t in range(len(experts[0]))]
    )
    if x.shape[1] == 0:
        return x, torch.zeros(len(x), 3, dtype=torch.float64)
    stored = torch.stack(
        [torch.cat([(of[t] - b).reshape(-1) for b, of in pairs]).abs().to(wide) for t in range(len(experts[0]))]
    )
    ordered = stored.sort(dim=1).values.double()
    low, high = (ordered[:, max(0, i)] for i in (int(x.shape[1] * clip), int(x.shape[1] * (1 - clip) - 1)))
    return x, torch.stack((low, high, torch.where(high > low, high - low, math.inf)), dim=1)


def check_scored(base: list[Tensor], experts: list[list[Tensor]], inter: str, density: list[float]) -> None:
    """Every step against the oracle: clipping, the limits of scores, the merge."""
    num_tasks = len(density)
    x, clipping = numbers_of(base, experts)
    scored = Scored(base, [expert for of_tensor in experts for expert in of_tensor], num_tasks, inter)
    assert torch.equal(scored.clipping(0.01), clipping)
    scores, _ = reference.scores(x, clipping, inter)
    factors = [0.7 - 0.2 * t for t in range(num_tasks)]
    limits = scored.limits(clipping, density, factors)
    if scored.numel:
        ranks = [max(1, scored.numel - int(scored.numel * (1 - d))) for d in density]
        threshold, top = reference.score_limits(scores, ranks).double().unbind(1)
        assert torch.equal(limits[:, 0], threshold)
        assert torch.equal(limits[:, 1], torch.where(top > threshold, top - threshold, math.inf))
    out = [torch.empty_like(b, memory_format=torch.contiguous_format) for b in base]
    scored.merge(clipping, limits, out)
    for merged, b, of_tensor in zip(out, base, experts, strict=True):
        assert_same(merged, reference.merge_by_scores(b, of_tensor, clipping, limits, inter), inter)


@pytest.mark.parametrize("inter", INTER)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_scores_of_every_kind_of_data(kind: Any, dtype: torch.dtype, inter: str) -> None:
    base, experts = inputs(kind, 1_603, 3, dtype)
    check_scored([base], [experts], inter, [0.05, 0.4, 0.97])


@pytest.mark.any_isa
@pytest.mark.parametrize("hit", [True, False], ids=["hit", "miss"])
def test_scores_of_several_tensors(hit: bool, request: pytest.FixtureRequest) -> None:
    """One limit for all of them, whether or not a sample tells where it is."""
    if not hit:
        request.getfixturevalue("forced_histogram")
    base, experts = [], []
    for i, shape in enumerate([(130, 300), (0, 3), (), (5_001,)]):
        of_base, of_tensor = inputs(gaussian, shape, 3, (torch.float32, torch.bfloat16)[i % 2])
        base.append(of_base)
        experts.append([of_base + (x - of_base) * (1 + i) for x in of_tensor])
    for inter in INTER:
        check_scored(base, experts, inter, [0.05, 0.5, 1e-9])


@pytest.mark.any_isa
def test_exp_and_tanh_are_those_of_torch() -> None:
    x = torch.randn(8, 4_000, generator=generator("scores"), dtype=torch.float64).clamp(-1, 1)
    clipping = torch.tensor([[0.0, 1.0, 1.0]], dtype=torch.float64).expand(8, 3)
    terms = torch.stack([torch.tanh(row * x) for row in x])
    for dtype, allowed in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        scores, changes = reference.scores(x.to(dtype), clipping, "paper")
        error = (scores.double() / torch.exp(8 * (x**2 - 1)) - terms.sum(1)).abs()
        assert (error < allowed * terms.abs().sum(1)).all()
        assert_same(changes, x.to(dtype))
    raw, _ = reference.scores(x, clipping, "raw")
    torch.testing.assert_close(raw, torch.exp(8 * (x**2 - 1)) * torch.tanh(x * x.sum(0)), rtol=1e-13, atol=1e-15)


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa", "restored_threads")
def test_the_same_bits_everywhere() -> None:
    base, experts = inputs(gaussian, 70_001, 3, torch.float32)
    importance, found = importance_of(experts), set()
    for isa in _C.isas():
        _C.set_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results = [weighted_merge(base, experts, importance), *(pcb_merge(base, experts, inter=i) for i in INTER)]
            found.add(tuple(bits(x).sum(dtype=torch.int64).item() for x in results))
    assert len(found) == 1


@pytest.mark.any_isa
def test_many_experts_do_not_overflow() -> None:
    x = torch.randn(200, 300, generator=generator("many"))
    merged = pcb_merge(None, x, density=0.3)
    assert merged.isfinite().all()
    assert merged.abs().max() > 0


@pytest.mark.any_isa
@pytest.mark.parametrize("which", NOT_FINITE)
def test_nonfinite_is_an_error(which: str) -> None:
    base, experts = not_finite(which)
    message = f"^{re.escape(NOT_FINITE[which])}$"
    options = {"names": ["a", "b"], "out": [torch.empty_like(x) for x in base]}
    with pytest.raises(RuntimeError, match=message):
        ops.weighted_merge_out(base, experts, [torch.ones_like(x) for x in experts], [1.0, 1.0], **options)
    with pytest.raises(RuntimeError, match=message):
        Scored(base, experts, 2, names=["a", "b"]).clipping(0.01)


@pytest.mark.any_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite_that_is_let_through(dtype: torch.dtype) -> None:
    base, experts = inputs(grid, 100, 3, dtype)
    experts[1][[3, 50, 99]] = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)
    importance = importance_of(experts)
    for nonfinite in ("propagate", "drop"):
        check(base, experts, importance, nonfinite=nonfinite)
        check(None, experts, importance, nonfinite=nonfinite)
    scored = Scored([base], experts, 3, nonfinite="drop")
    clipping = scored.clipping(0.01)
    out = torch.empty_like(base)
    scored.merge(clipping, scored.limits(clipping, [0.3] * 3, [1.0] * 3), [out])
    without = [torch.where(expert.isfinite(), expert, base) for expert in experts]
    assert_same(out, pcb_merge(base, without, density=0.3))
    merged = pcb_merge(base, experts, density=0.3, clip=0.05, nonfinite="propagate")
    assert merged[3].isnan()
    assert merged[torch.arange(100) != 3].isfinite().all()  # infinity is clipped


@pytest.mark.any_isa
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_importance_that_is_none(dtype: torch.dtype, value: float) -> None:
    _, experts = inputs(gaussian, 40_000, 2, dtype)
    for wide in (False, True):
        importance = importance_of(experts, wide=wide)
        importance[1][[5, 39_999]] = value
        message = r"^importance\[1\] must be finite and 0 or greater, got 2 other values$"
        with pytest.raises(RuntimeError, match=message):
            weighted_merge(None, experts, importance)
        importance[1][[5, 39_999]] = -0.0
        assert weighted_merge(None, experts, importance).isfinite().all()


ONES = [torch.ones(4), torch.ones(4)]
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("importance must be one tensor per expert (2), got 1", {"importance": ONES[:1]}),
    ("importance[1] must be a tensor, got float", {"importance": [torch.ones(4), 1.0]}),
    (
        "importance[0] must have the dtype of experts[0], torch.float32, or torch.float32 as all others, "
        "got torch.float64",
        {"importance": torch.ones(2, 4, dtype=torch.float64)},
    ),
    ("importance[1] must have the shape of experts[0], (4,), got (5,)", {"importance": [ONES[0], torch.ones(5)]}),
    (
        "importance[0] must be on the device of experts[0], cpu, got meta",
        {"importance": torch.ones(2, 4, device="meta")},
    ),
    ("weights must be 0 or greater, got -1.0", {"weights": [1.0, -1.0]}),
    ("weights must have a sum above 0, got 0.0", {"weights": 0.0}),
    ("weights must be one number or one per expert (2), got 3", {"weights": [1.0] * 3}),
    ("floor must be finite and 0 or greater, got -1.0", {"floor": -1.0}),
    ("floor must be finite and 0 or greater, got inf", {"floor": math.inf}),
    ("nonfinite must be one of 'error', 'propagate', 'drop', got 'no'", {"nonfinite": "no"}),
    ("out must have the shape of experts[0], (4,), got (5,)", {"out": torch.ones(5)}),
]
REFUSED_BY_SCORES: list[tuple[str, dict[str, Any]]] = [
    ("density must be in (0, 1], got 0.0", {"density": 0.0}),
    ("clip must be in [0, 0.5), got 0.5", {"clip": 0.5}),
    ("inter must be one of 'paper', 'half', 'raw', got 'all'", {"inter": "all"}),
    ("weights must be finite, got nan", {"weights": math.nan}),
    ("lam must be finite, got inf", {"lam": math.inf}),
    ("nonfinite must be one of 'error', 'propagate', 'drop', got 'no'", {"nonfinite": "no"}),
    ("out must have the dtype of experts[0], torch.float32, got torch.float64", {"out": torch.ones(4).double()}),
]


@pytest.mark.any_isa
@pytest.mark.parametrize(("message", "changes"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused(message: str, changes: dict[str, Any]) -> None:
    options = {"importance": ONES, **changes}
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        weighted_merge(None, ONES, options.pop("importance"), **options)


@pytest.mark.any_isa
@pytest.mark.parametrize(("message", "changes"), REFUSED_BY_SCORES, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_by_scores(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        pcb_merge(None, ONES, **changes)


CLIPPING = torch.tensor([[0.0, 1.0, 1.0]] * 2, dtype=torch.float64)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "importance must be one tensor for every expert and merged tensor (2), got 1",
            lambda out: ops.weighted_merge_out([], ONES, ONES[:1], [1.0, 1.0], out=out),
        ),
        (
            "importance must have the shape of the experts, got another",
            lambda out: ops.weighted_merge_out([], ONES, [ONES[0], torch.ones(5)], [1.0, 1.0], out=out),
        ),
        (
            "importance must have the dtype of the experts or the one that is computed in, got another",
            lambda out: ops.weighted_merge_out([], ONES, [x.half() for x in ONES], [1.0, 1.0], out=out),
        ),
        (
            "out must be apart from every input, got memory that overlaps one",
            lambda out: ops.weighted_merge_out([], ONES, [out[0], ONES[1]], [1.0, 1.0], out=out),
        ),
        (
            "clipping must be float64 [num_tasks, 3] on the CPU, got another dtype, shape or device",
            lambda out: ops.weighted_merge_limits([], ONES, CLIPPING[:, :2], [1, 1]),
        ),
        (
            "limits must be float64 [num_tasks, 3] on the CPU, got another dtype, shape or device",
            lambda out: ops.weighted_merge_scored_out([], ONES, CLIPPING, CLIPPING.float(), out=out),
        ),
        (
            "limits must be of as many experts as clipping (2), got 1",
            lambda out: ops.weighted_merge_scored_out([], ONES, CLIPPING, CLIPPING[:1], out=out),
        ),
        (
            "ranks must be one for every expert (2), got 1",
            lambda out: ops.weighted_merge_limits([], ONES, CLIPPING, [1]),
        ),
        (
            "ranks must be in [1, 4], the number of entries, got 0",
            lambda out: ops.weighted_merge_limits([], ONES, CLIPPING, [1, 0]),
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_ops_refuse_what_would_corrupt_memory(message: str, call: Any) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        call([torch.ones(4)])


@pytest.mark.any_isa
def test_opcheck() -> None:
    base, experts = inputs(gaussian, 100, 2, torch.float32)
    out = [torch.zeros_like(base)]
    torch.library.opcheck(ops.weighted_merge_out, ([base], experts, importance_of(experts), [1.0, 2.0]), {"out": out})
    torch.library.opcheck(ops.weighted_merge_scored_out, ([base], experts, CLIPPING, CLIPPING), {"out": out})
    torch.library.opcheck(ops.weighted_merge_limits, ([base], experts, CLIPPING, [3, 7]))


@pytest.mark.any_isa
def test_compiled_whole() -> None:
    base, experts = inputs(gaussian, 1_000, 3, torch.float32)
    importance = importance_of(experts)

    def merge(base: Tensor, experts: list[Tensor]) -> tuple[Tensor, Tensor]:
        return weighted_merge(base, experts, importance) * 2, pcb_merge(base, experts, density=0.2) + 1

    torch.compiler.reset()
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(base, experts), merge(base, experts), strict=True):
        assert_same(actual, expected)
    importance[0][0] = -1
    with pytest.raises(RuntimeError, match=r"^importance\[0\] must be finite and 0 or greater, got 1 other values$"):
        compiled(base, experts)
