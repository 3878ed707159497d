"""What narrows a merge on CUDA tensors, and merges rounded once: against the oracle and against the bits of the CPU."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from surgery_kernels.ops.masks import check_seed, pack
from tests.cases import (
    DTYPES,
    SHAPES,
    Inputs,
    assert_same,
    bits,
    cancelling,
    denormal,
    densities_of,
    equal,
    gaussian,
    generator,
    grid,
    inputs,
    large,
    merge_options,
    option_id,
    sparse,
    weights_of,
    with_weights,
)
from tests.guards import assert_border_kept, guarded
from tests.keep_cases import as_reference, exact_options, factors_of, masks_of, sources

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

KINDS = [gaussian, sparse, grid, cancelling, large, denormal]


def merge(gpu: torch.device, base: Tensor | None, experts: list[Tensor], shift: int = 0, **options: Any) -> Tensor:
    from surgery_kernels.triton.ties_merge import ties_merge_out

    out = guarded(torch.full_like(experts[0], math.nan), gpu, shift)
    options = as_op(options, experts)
    moved = [guarded(expert, gpu, shift) for expert in experts]
    for name in ("keep", "upper"):
        if name in options:
            options[name] = [x.to(gpu) for x in options[name]] if name == "keep" else options[name].to(gpu)
    ties_merge_out([] if base is None else [guarded(base, gpu, shift)], moved, **options, out=[out])
    assert_border_kept(out)
    return out.cpu()


def as_op(options: dict[str, Any], experts: list[Tensor]) -> dict[str, Any]:
    """The options of `ties_merge` as the op takes them."""
    options = {"density": [1.0] * len(experts), **as_reference(options, experts[0].shape)}
    if "keep" in options:
        options["keep"] = [pack(keep) for keep in options["keep"]]
    if "seed" in options:
        options["seed"] = check_seed(options["seed"])
    return options


def check(gpu: torch.device, base: Tensor | None, experts: list[Tensor], shift: int = 0, **options: Any) -> None:
    expected = reference.ties_merge(base, experts, **{"density": 1.0, **as_reference(options, experts[0].shape)})
    shown = {name: value for name, value in options.items() if name != "keep"}
    assert_same(merge(gpu, base, experts, shift, **options), expected, str(shown))


@pytest.mark.parametrize("options", [*merge_options(), *exact_options()], ids=option_id)
def test_every_option(options: dict[str, Any], gpu: torch.device) -> None:
    place = [*merge_options(), *exact_options()].index(options)
    for i, narrowed in enumerate(sources(4, (257,))):
        dtype = DTYPES[(place + i) % 4]
        kind = KINDS[(place + 2 * i) % len(KINDS)]
        if options.get("rescale") and dtype == torch.float64:  # the oracle's norms are exact
            kind = grid
        base, experts = inputs(kind, 257, 4, dtype)
        extra: dict[str, Any] = {"density": densities_of(4), "lam": (1.0, -0.3)[place % 2], **narrowed}
        if options["semantics"] in ("mergekit", "exact") and not options.get("rescale") and (place + i) % 2:
            extra["scales"] = factors_of(4)
        if options["reduce"] == "unique" and i % 2:
            extra["unique_scales"] = [1.5, 0.1, -1.0, 3.0]
        check(gpu, base if (place + i) % 3 else None, experts, i % 2, **with_weights(options, 4), **extra)


@pytest.mark.parametrize("options", exact_options(), ids=option_id)
def test_rounded_once(options: dict[str, Any], gpu: torch.device) -> None:
    for i, dtype in enumerate(DTYPES):
        kind = grid if options.get("rescale") else KINDS[i % len(KINDS)]
        base, experts = inputs(kind, 257, 3, dtype)
        check(gpu, base if i % 2 else None, experts, density=densities_of(3), lam=0.3, **with_weights(options, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], gpu: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = inputs(gaussian, shape, 2, dtype)
        for i, narrowed in enumerate(sources(2, shape)):
            check(gpu, base, experts, shift=i % 2, semantics="mergekit", **narrowed)
            check(gpu, None, experts, semantics="exact", elect="none", reduce="magmax", **narrowed)


def test_the_bits_of_the_cpu(gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 9_001, 5, dtype)
        for narrowed in sources(5, (9_001,)):
            for options in (
                {"semantics": "mergekit", "weights": weights_of(5), "elect": "none"},
                {"semantics": "exact", "weights": weights_of(5), "lam": 0.3},
                {},
            ):
                given = as_op({**options, **narrowed, "nonfinite": "propagate"}, experts)
                out = torch.full_like(base, math.nan)
                torch.ops.surgery_kernels.ties_merge_out([base], experts, **given, out=[out])
                merged = merge(gpu, base, experts, **options, **narrowed, nonfinite="propagate")
                assert torch.equal(bits(merged), bits(out))


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
def test_nonfinite_values(nonfinite: str, gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(grid, 300, 3, dtype)
        experts[0][::50] = math.nan
        experts[1][7::60] = math.inf
        experts[2][7::30] = -math.inf
        for narrowed in sources(3, (300,)):
            for options in (
                {"semantics": "mergekit"},
                {"semantics": "exact", "elect": "none", "reduce": "magmax"},
                {"semantics": "exact", "elect": "none", "reduce": "unique"},
            ):
                check(gpu, base, experts, nonfinite=nonfinite, **options, **narrowed)


@pytest.mark.parametrize("semantics", ["paper", "mergekit", "peft", "exact"])
def test_several_dtypes_are_one_scope(semantics: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.ties_merge import ties_merge_out

    problems: list[Inputs] = []
    for i, size in enumerate((300, 4_101, 0, 20, 65)):
        problems.append(inputs(grid, size, 3, (torch.bfloat16, torch.float32, torch.float16)[i % 3]))
    bases, experts = [base for base, _ in problems], [of_tensor for _, of_tensor in problems]
    numel = sum(base.numel() for base in bases)
    keep = [masks_of((1, 3)[i % 2], base.shape, 0.7) for i, base in enumerate(bases)]
    options: dict[str, Any] = {
        "semantics": semantics,
        "lam": 0.3,
        "thresholds": torch.tensor([2 / 64, 0.0, 0.01]),
        "cuts": [numel // 2, 3_000, numel],
        "upper": torch.tensor([5 / 64, 3 / 64, 4 / 64]),
        "upper_cuts": [numel // 3, 350, 0],
        "keep_density": [0.9, 0.5, 1.0],
        "seed": -11,
        "tensor_ids": [3, 1, 4, 1, 5],
        "task_ids": [2, 7, 1],
        "min_count": 1,
    }
    if semantics in ("mergekit", "exact"):
        options["scales"] = torch.rand(len(bases), 3, generator=generator("scales"), dtype=torch.float64)
    out = [torch.full_like(base, math.nan, device=gpu) for base in bases]
    ties_merge_out(
        [base.to(gpu) for base in bases],
        [expert.to(gpu) for of_tensor in experts for expert in of_tensor],
        [1.0] * 3,
        **options,
        keep=[pack(mask).to(gpu) for mask in keep],
        out=out,
    )
    expected = reference.scope_merge(bases, list(zip(*experts, strict=True)), **options, keep=keep)
    for merged, wanted in zip(out, expected, strict=True):
        assert_same(merged.cpu(), wanted)


def test_thresholds_without_cuts_are_rescaled_with_their_ties(gpu: torch.device) -> None:
    base, experts = inputs(equal, 300, 3, torch.float32)
    options = {"semantics": "mergekit", "rescale": True, "thresholds": torch.tensor([0.25, 0.0, 0.5])}
    check(gpu, base, experts, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": []}, "keep must be one tensor for every merged tensor, got 0 for 1"),
        ({"keep": [torch.ones(2, 2).byte()]}, "keep must be uint8 [num_tasks or 1, 1], got torch.uint8 (2, 2)"),
        ({"keep": [torch.ones(2, 1)]}, "keep must be uint8 [num_tasks or 1, 1], got torch.float32 (2, 1)"),
        (
            {"keep": [torch.ones(2, 1, dtype=torch.uint8, device="meta")]},
            "keep must be on the device of experts[0], DEVICE, got meta",
        ),
        ({"upper_cuts": [1, 2]}, "upper must be given where upper_cuts are, got none"),
        ({"upper": torch.ones(2), "upper_cuts": [1]}, "upper_cuts must be one per expert, got 1"),
        ({"upper": torch.ones(3)}, "upper must be one value per expert, got 3"),
        ({"upper": torch.ones(2).half()}, "upper must be float32 or float64, got torch.float16"),
        ({"upper": torch.tensor([1.0, -1.0])}, "upper must be 0 or greater, got -1"),
        ({"keep_density": [0.5]}, "keep_density must be one number per expert (2), got 1"),
        ({"keep_density": [0.5, -1.0]}, "keep_density must be 0 or greater, got -1"),
        (
            {"keep_density": [0.5] * 2, "tensor_ids": [1, 2]},
            "tensor_ids must be one number for every merged tensor (1), got 2",
        ),
        ({"keep_density": [0.5] * 2, "task_ids": [1, -1]}, "task_ids must be in [0, 2**32), got -1"),
        (
            {"scales": torch.ones(1, 2), "semantics": "exact"},
            "scales must be float64 [1, 2], got torch.float32 [1, 2]",
        ),
        (
            {"scales": torch.ones(1, 2).double()},
            "semantics must be 'mergekit' or 'exact' where scales are given, got another",
        ),
        (
            {"scales": torch.ones(1, 2).double(), "semantics": "mergekit", "rescale": True},
            "rescale must be False where scales are given, got True",
        ),
        (
            {"unique_scales": torch.ones(1, 2).double()},
            "reduce must be 'unique' where unique_scales are given, got 'mean'",
        ),
        ({"min_count": 3}, "min_count must be between 0 and the number of experts, got 3"),
        (
            {"reduce": "magmax"},
            "semantics and elect must be 'exact' and 'none' with reduce='magmax', got 'paper' and 'sum'",
        ),
        (
            {"semantics": "exact", "elect": "none", "reduce": "unique", "weights": [1.0, 2.0]},
            "weights must be None with reduce='unique', got weights",
        ),
        (
            {"semantics": "exact", "elect": "none", "reduce": "unique", "normalize": False},
            "normalize must be True with reduce='unique', got False",
        ),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], message: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.ties_merge import ties_merge_out

    experts = [torch.ones(4, device=gpu)] * 2
    message = message.replace("DEVICE", str(experts[0].device))
    if "keep" in options:
        options = {"keep": [x if x.device.type == "meta" else x.to(gpu) for x in options["keep"]]}
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        ties_merge_out([], experts, [1.0] * 2, **options, out=[torch.zeros(4, device=gpu)])
