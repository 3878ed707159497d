"""ties_merge with masks, random numbers, upper limits, factors and counts, and rounded once: against the oracle."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import _C, masks, reference, ties_merge, ties_split, trim_thresholds
from surgery_kernels.ops.masks import pack
from tests.cases import (
    DTYPES,
    KINDS,
    NUM_TASKS,
    SHAPES,
    Kind,
    assert_same,
    bits,
    cancelling,
    densities_of,
    equal,
    gaussian,
    generator,
    grid,
    inputs,
    leaning_down,
    leaning_up,
    merge_options,
    option_id,
    rows,
    sparse,
    weights_of,
    with_weights,
)
from tests.keep_cases import as_reference, exact_options, factors_of, masks_of, sources

OPS = torch.ops.surgery_kernels
LARGE = 100_003
MERGEKIT = ["dare_linear", "dare_ties", "della_linear", "della", "breadcrumbs", "breadcrumbs_ties"]


def check(base: Tensor | None, experts: list[Tensor], what: str = "", **options: Any) -> None:
    expected = reference.ties_merge(base, experts, **as_reference(options, experts[0].shape))
    shown = {name: value for name, value in options.items() if name != "keep"}
    assert_same(ties_merge(base, experts, **options), expected, f"{what} {shown}")


def exact_l1_norms(kind: Kind, dtype: torch.dtype) -> bool:
    """The oracle's L1 norms are exact; a float64 sum of float64 numbers is not."""
    return dtype != torch.float64 or kind in (grid, sparse, equal, cancelling, leaning_up, leaning_down)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("options", [*merge_options(), *exact_options()], ids=option_id)
def test_every_option(options: dict[str, Any], dtype: torch.dtype) -> None:
    place = [*merge_options(), *exact_options()].index(options)
    for i, narrowed in enumerate(sources(4, (257,))):
        kind = KINDS[(place + i) % len(KINDS)]
        if options.get("rescale") and not exact_l1_norms(kind, dtype):
            kind = grid
        base, experts = inputs(kind, 257, 4, dtype)
        extra: dict[str, Any] = {"density": (1.0, 0.3)[i % 2], "lam": (1.0, -0.3)[place % 2], **narrowed}
        if options["semantics"] in ("mergekit", "exact") and not options.get("rescale") and (place + i) % 2:
            extra["scales"] = factors_of(4)
        if options["reduce"] == "unique" and i % 2:
            extra["unique_scales"] = [1.5, 0.1, -1.0, 3.0]
        check(base if (place + i) % 3 else None, experts, kind.__name__, **with_weights(options, 4), **extra)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("options", exact_options(), ids=option_id)
def test_rounded_once(options: dict[str, Any], dtype: torch.dtype) -> None:
    for kind in KINDS:
        if options.get("rescale") and not exact_l1_norms(kind, dtype):
            continue
        for num_tasks, density, lam in ((3, 0.2, 1.0), (4, 0.5, -0.3)):
            base, experts = inputs(kind, 257, num_tasks, dtype)
            check(base, experts, kind.__name__, density=density, lam=lam, **with_weights(options, num_tasks))
            check(
                None,
                experts,
                kind.__name__,
                normalize=options["reduce"] == "unique",
                **with_weights(options, num_tasks),
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=option_id)
def test_exact_is_the_float32_result_rounded(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, 5_000, 4, dtype)
    options: dict[str, Any] = {"semantics": "exact", "weights": weights_of(4), "lam": 0.7, "density": 1.0}
    for elect in ("sum", "none"):
        wide = ties_merge(base.float(), [expert.float() for expert in experts], elect=elect, **options)
        assert_same(ties_merge(base, experts, elect=elect, **options), wide.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, shape, 3, dtype)
    for narrowed in sources(3, shape):
        for semantics in ("paper", "mergekit", "peft", "exact"):
            check(base, experts, lam=0.3, semantics=semantics, **narrowed)
        check(None, experts, semantics="exact", elect="none", reduce="magmax", **narrowed)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 333, num_tasks, dtype)
        for narrowed in sources(num_tasks, (333,)):
            check(base, experts, density=densities_of(num_tasks), **narrowed)
            check(base, experts, weights=weights_of(num_tasks), semantics="mergekit", **narrowed)
            check(base, experts, semantics="exact", elect="none", reduce="unique", **narrowed)


def test_every_layout() -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, (12, 21), 3, dtype)
        keep = masks_of(3, (12, 21))
        expected = reference.ties_merge(base, experts, semantics="exact", keep=[keep], upper=[0.06] * 3)
        turned = [x.t().contiguous().t() for x in (base, *experts)]
        shifted = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape) for x in (base, *experts)]
        every_other = torch.stack([pack(keep), pack(keep)], dim=2)[:, :, 0]
        for moved in (turned, shifted):
            for given in (keep, keep.transpose(1, 2).contiguous().transpose(1, 2), every_other):
                merged = ties_merge(moved[0], moved[1:], semantics="exact", keep=given, upper=[0.06] * 3)
                assert_same(merged, expected)


@pytest.mark.parametrize("kind", [gaussian, grid, equal, rows, leaning_up, leaning_down], ids=option_id)
def test_large(kind: Kind) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = inputs(kind, LARGE, 3, dtype)
        for narrowed in sources(3, (LARGE,)):
            check(base, experts, lam=0.3, **narrowed)
            check(base, experts, semantics="mergekit", rescale=True, density=0.5, **narrowed)


def test_masks_that_keep_all_change_nothing() -> None:
    for options in [*merge_options(), *exact_options()]:
        options = with_weights(options, 3)
        for dtype in DTYPES:
            base, experts = inputs(grid, 333, 3, dtype)
            plain = ties_merge(base, experts, **options)
            for all_of_them in (
                {"keep": torch.ones(3, 333, dtype=torch.bool)},
                {"keep_density": 1.0, "seed": 3},
                {"upper": torch.full((3,), math.inf)},
            ):
                # mergekit's random methods round norms of float16 to float32
                if dtype == torch.float16 and options["semantics"] == "mergekit" and options.get("rescale"):
                    continue
                assert torch.equal(bits(ties_merge(base, experts, **options, **all_of_them)), bits(plain))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_random_numbers_are_those_of_masks(dtype: torch.dtype) -> None:
    base, experts = inputs(gaussian, 40_001, 3, dtype)
    drawn: dict[str, Any] = {"seed": -3, "tensor_id": 2**32 - 1, "task_ids": [5, 0, 2**32 - 1]}
    kept, sums = masks(base, experts, density=[0.3, 0.9, 1.0], **drawn)
    for options in ({"semantics": "mergekit", "elect": "none"}, {}, {"semantics": "exact", "elect": "count"}):
        by_mask = ties_merge(base, experts, density=1.0, keep=kept, **options)
        by_number = ties_merge(base, experts, density=1.0, keep_density=[0.3, 0.9, 1.0], **drawn, **options)
        assert torch.equal(bits(by_number), bits(by_mask))
    # norms add up in the same order, so that factors from the sums of `masks` are those of `rescale`
    work = dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32
    scales = (sums[:, 1].to(work) / sums[:, 2].to(work)).tolist()
    options = {"semantics": "mergekit", "elect": "none", "density": 1.0, "keep": kept}
    rescaled = ties_merge(base, experts, rescale=True, **options)
    assert torch.equal(bits(ties_merge(base, experts, scales=scales, **options)), bits(rescaled))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", [gaussian, grid, equal], ids=option_id)
def test_ranks_between_two_limits(kind: Kind, dtype: torch.dtype) -> None:
    """What breadcrumbs keeps: positions low to high of a stable ascending order, less the largest."""
    for numel, low, high in ((1_000, 300, 950), (40_000, 39_000, 40_000), (257, 0, 3), (64, 10, 10), (100, 0, 100)):
        base, experts = inputs(kind, numel, 3, dtype)
        ranks = [numel - low, numel - high] * 3
        thresholds, cuts = OPS.trim_limits([base], experts, [1.0] * 3, ranks=ranks)
        taus = [(expert - base).abs() for expert in experts]
        order = [(-tau).argsort(stable=True) for tau in taus]
        kept = torch.zeros(3, numel, dtype=torch.bool)
        for t in range(3):
            kept[t, order[t][numel - high : numel - low]] = True
        out = torch.full_like(base, math.nan)
        limits = {"thresholds": thresholds[::2], "cuts": cuts[::2].tolist()}
        uppers = {"upper": thresholds[1::2], "upper_cuts": cuts[1::2].tolist()}
        OPS.ties_merge_out([base], experts, [1.0] * 3, semantics="mergekit", **limits, **uppers, out=[out])
        expected = reference.ties_merge(base, experts, density=1.0, semantics="mergekit", keep=[kept])
        assert_same(out, expected, f"{low} to {high} of {numel}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=option_id)
@pytest.mark.parametrize("method", MERGEKIT)
def test_mergekit(method: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own masks, as bits; sums of multiples of 1/64 are exact in any order."""
    pytest.importorskip("mergekit.merge_methods", reason="mergekit is not installed", exc_type=ImportError)
    from mergekit import sparsify
    from mergekit.merge_methods import get as method_named
    from mergekit.merge_methods.base import TensorGroup

    drawn: list[Tensor] = []
    apply = sparsify.rescaled_masked_tensor

    def recording(tensor: Tensor, mask: Tensor, norm: Any) -> Tensor:
        drawn.append(mask != 0)
        return apply(tensor, mask, norm)

    monkeypatch.setattr(sparsify, "rescaled_masked_tensor", recording)
    torch.manual_seed(42)
    for normalize, rescale, lam in itertools.product((False, True), (False, True), (1.0, 0.3)):
        if rescale and "breadcrumbs" in method and dtype == torch.float16:
            continue  # masks say that the method is a random one
        base, experts = inputs(grid, (60, 70), 3, dtype)
        parameters: dict[str, Any] = {
            "density": {1: 0.5, 2: 0.7, 3: 0.3},
            "weight": dict(zip((1, 2, 3), weights_of(3), strict=True)),
            "gamma": dict.fromkeys((1, 2, 3), 0.01),
            "epsilon": dict.fromkeys((1, 2, 3), 0.15),
        }
        shared = {"lambda": lam, "normalize": normalize, "rescale": rescale, "int8_mask": False}
        group = TensorGroup.from_tensors([base, *experts], base_index=0)
        taken = {"gamma"} if "breadcrumbs" in method else {"epsilon"} if "della" in method else set()
        parameters = {name: value for name, value in parameters.items() if name in {"density", "weight", *taken}}
        expected = method_named(method).merge_group(group, **parameters, **shared)
        merged = ties_merge(
            base,
            experts,
            density=1.0,
            lam=lam,
            weights=weights_of(3),
            semantics="mergekit",
            elect="none" if method in ("dare_linear", "della_linear", "breadcrumbs") else "sum",
            normalize=normalize,
            rescale=rescale,
            keep=torch.stack(drawn[-3:]),
        )
        assert_same(merged, expected, f"{normalize=} {rescale=} {lam=}")


def exactly(base: Tensor | None, experts: list[list[float]], **options: Any) -> list[float]:
    return ties_merge(base, torch.tensor(experts), semantics="exact", elect="none", density=1.0, **options).tolist()


def test_reductions_by_hand() -> None:
    rows_ = [[4.0, -1, 0, 2], [2, 3, 0, -2], [-1, 1, 5, 2]]
    assert exactly(None, rows_, reduce="magmax") == [4, 3, 5, 2]
    assert exactly(None, [[1.0, -2], [-1, 2]], reduce="magmax") == [-1, 2]  # the last of equal magnitudes
    assert exactly(torch.tensor([1.0, 1.0]), [[1.5, 1.0], [1.0, 1.0]], reduce="magmax", lam=2.0) == [2, 1]
    assert exactly(None, [[1.0, 0, 2], [0, 3, 4]], reduce="unique") == [1, 3, 3]
    ram = exactly(None, [[1.0, 0, 2], [0, 3, 4]], reduce="unique", unique_scales=[1.5, 2.0])
    assert ram == [1.5, 6, 3]
    assert exactly(None, [[1.0, 0, 2], [0, 3, 4]], reduce="mean", weights=[1.0, 3.0]) == [1, 3, 3.5]
    assert exactly(torch.tensor([7.0, 7, 7]), [[8.0, 7, 9], [7, 10, 11]], reduce="sum", min_count=2) == [7, 7, 13]
    keep = torch.tensor([[True, False, True, True], [True, True, False, True], [False, True, True, False]])
    assert exactly(None, rows_, reduce="sum", keep=keep) == [6, 4, 5, 0]
    assert exactly(None, rows_, reduce="magmax", keep=keep) == [4, 3, 5, -2]
    assert exactly(None, rows_, reduce="sum", thresholds=[2.0] * 3, upper=[3.0] * 3) == [2, 3, 0, 2]


def test_a_threshold_that_is_itself_dropped() -> None:
    # RAM keeps abs > 1e-5: the next number upwards is the smallest one kept
    edge = torch.tensor(1e-5)
    above = torch.nextafter(edge, torch.tensor(1.0))
    experts = torch.stack([torch.stack([edge, above, -edge, -above]), torch.zeros(4)])
    result = ties_merge(None, experts, semantics="exact", elect="none", reduce="unique", thresholds=above.repeat(2))
    assert_same(result, torch.stack([edge * 0, above, edge * 0, -above]))


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite_values(dtype: torch.dtype, nonfinite: str) -> None:
    base, experts = inputs(grid, 1_000, 3, dtype)
    experts[0][[1, 10, 20]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    experts[2][[10, 30]] = torch.tensor([-math.inf, math.inf], dtype=dtype)
    for narrowed in sources(3, (1_000,)):
        for semantics in ("paper", "mergekit", "peft", "exact"):
            check(base, experts, semantics=semantics, nonfinite=nonfinite, **narrowed)
        for reduce in ("mean", "magmax", "unique"):
            options = {"semantics": "exact", "elect": "none", "reduce": reduce, "density": 1.0}
            check(base, experts, nonfinite=nonfinite, **options, **narrowed)
            check(None, experts, nonfinite=nonfinite, **options, **narrowed)


def test_masks_keep_nan_away_and_limits_do_not() -> None:
    experts = [torch.tensor([math.nan, 1.0, math.inf]), torch.zeros(3)]
    options: dict[str, Any] = {"semantics": "exact", "nonfinite": "propagate", "density": 1.0, "elect": "none"}
    dropped = torch.tensor([[False, True, False]])
    assert_same(ties_merge(None, experts, keep=dropped, **options), torch.tensor([0.0, 1.0, 0.0]))
    assert_same(ties_merge(None, experts, upper=[0.5, 0.5], **options), torch.tensor([math.nan, 0.0, 0.0]))


PARTS = [(40, 50), (), (0, 3), (4_099,), (3, 7, 11), (1,), (40_000,)]


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("semantics", ["paper", "mergekit", "peft", "exact"])
def test_several_tensors_are_one_scope(semantics: str, dtype: torch.dtype) -> None:
    bases, experts, keep = [], [], []
    for i, shape in enumerate(PARTS):
        base, of_tensor = inputs((grid, gaussian)[i % 2 if semantics == "exact" else 0], shape, 3, dtype)
        bases.append(base)
        experts.append(of_tensor)
        keep.append(masks_of((1, 3)[i % 2], shape, 0.7))
    numel = sum(base.numel() for base in bases)
    options: dict[str, Any] = {
        "semantics": semantics,
        "lam": 0.3,
        "keep_density": [0.9, 0.5, 1.0],
        "seed": 11,
        "tensor_ids": [3, 1, 4, 1, 5, 9, 2],
        "min_count": 1,
        "thresholds": torch.tensor([2 / 64, 0.0, 0.01]),
        "upper": torch.tensor([5 / 64, 3 / 64, 4 / 64]),
    }
    if semantics in ("mergekit", "exact"):
        options["scales"] = torch.rand(len(PARTS), 3, generator=generator("scales"), dtype=torch.float64)
    cuts = {"cuts": [numel // 2, 3_000, numel], "upper_cuts": [numel // 3, 5_000, 0]}
    flat, rows_ = [expert for of_tensor in experts for expert in of_tensor], list(zip(*experts, strict=True))
    out = [torch.full_like(base, math.nan) for base in bases]
    packed = [pack(mask.reshape(len(mask), -1)) for mask in keep]
    OPS.ties_merge_out(bases, flat, [1.0] * 3, **options, **cuts, keep=packed, out=out)
    expected = reference.scope_merge(bases, rows_, **options, **cuts, keep=keep)
    for part, expected_part in zip(out, expected, strict=True):
        assert_same(part, expected_part)
    if semantics == "paper":  # draws take the sign of a whole call
        return
    before = 0
    for i, (base, expected_part) in enumerate(zip(bases, expected, strict=True)):
        alone = {**options, "tensor_ids": options["tensor_ids"][i : i + 1], "keep": packed[i : i + 1]}
        if "scales" in options:
            alone["scales"] = options["scales"][i : i + 1]
        moved = {name: [cut - before for cut in values] for name, values in cuts.items()}
        OPS.ties_merge_out([base], experts[i], [1.0] * 3, **alone, **moved, out=[out[i].fill_(math.nan)])
        assert_same(out[i], expected_part)
        before += base.numel()


def test_every_instruction_set_and_thread_count(restored_isa: None, restored_threads: None) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, LARGE, 3, dtype)
        for narrowed in sources(3, (LARGE,)):
            for options in (
                {"semantics": "mergekit", "rescale": True},
                {},
                {"semantics": "exact", "rescale": True, "weights": weights_of(3)},
                {"semantics": "exact", "elect": "none", "reduce": "magmax"},
            ):
                results = []
                for isa, threads in ((isa, threads) for isa in _C.isas() for threads in (1, 3)):
                    _C.set_isa(isa)
                    torch.set_num_threads(threads)
                    results.append(bits(ties_merge(base, experts, density=0.9, **options, **narrowed)))
                assert all(torch.equal(result, results[0]) for result in results), (dtype, options)


def test_split_rounds_once_too() -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 257, 3, dtype)
        for elect in ("sum", "count", "none"):
            options: dict[str, Any] = {"semantics": "exact", "elect": elect, "weights": weights_of(3), "density": 0.4}
            assert_same(ties_split(base, experts, **options), reference.ties_split(base, experts, **options))


def test_thresholds_keep_one_entry_at_least() -> None:
    base, experts = inputs(gaussian, 100, 2, torch.float32)
    expected = trim_thresholds(base, experts, density=1e-4, semantics="mergekit")
    assert_same(trim_thresholds(base, experts, density=1e-4, semantics="exact"), expected)


@pytest.mark.any_isa
def test_as_torch_sees_it() -> None:
    base, experts = inputs(gaussian, 1_000, 3, torch.float32)
    drawn = {"keep_density": [0.5] * 3, "seed": 3, "tensor_ids": [1], "task_ids": [2, 1, 0]}
    every_option = {
        **drawn,
        "keep": [pack(masks_of(3, (1_000,)))],
        "upper": torch.ones(3),
        "upper_cuts": [1, 2, 3],
        "scales": torch.ones(1, 3, dtype=torch.float64),
        "min_count": 1,
        "semantics": "mergekit",
    }
    unique = {"semantics": "exact", "elect": "none", "reduce": "unique", "unique_scales": torch.ones(1, 3).double()}
    for options in (drawn, every_option, unique):
        torch.library.opcheck(OPS.ties_merge_out, ([base], experts, [0.5] * 3), {**options, "out": [base.clone()]})


@pytest.mark.any_isa
def test_compiled() -> None:
    def merge(base: Tensor, experts: list[Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
        exact: dict[str, Any] = {"semantics": "exact", "elect": "none", "reduce": "magmax", "density": 1.0}
        return ties_merge(base, experts, keep=keep, **exact) + 1, ties_merge(base, experts, keep_density=0.5, seed=9)

    torch.compiler.reset()
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    for count in (1_000, 333):
        base, experts = inputs(gaussian, count, 3, torch.float32)
        keep = masks_of(3, (count,))
        for actual, expected in zip(compiled(base, experts, keep), merge(base, experts, keep), strict=True):
            assert_same(actual, expected)
