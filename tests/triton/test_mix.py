"""linear_merge_out on CUDA tensors: the Triton kernels against the oracle and against the bits of the CPU."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from tests.cases import DTYPES, KINDS, SHAPES, assert_same, bits, gaussian, grid, inputs, option_id, weights_of
from tests.guards import Counted, assert_border_kept, guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]


def merge(gpu: torch.device, base: Tensor | None, experts: list[Tensor], shift: int = 0, **options: Any) -> Tensor:
    from surgery_kernels.triton.linear_merge import linear_merge_out

    out = guarded(torch.full_like(experts[0], math.nan), gpu, shift)
    bases = [] if base is None else [guarded(base, gpu, shift)]
    linear_merge_out(bases, [guarded(expert, gpu, shift) for expert in experts], **options, out=[out])
    assert_border_kept(out)
    return out.cpu()


def check(gpu: torch.device, base: Tensor | None, experts: list[Tensor], **options: Any) -> None:
    merged = merge(gpu, base, experts, **options)
    options.pop("shift", None)
    assert_same(merged, reference.linear_merge(base, experts, **options), str(options))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(kind, 257, 4, dtype)
    check(gpu, base, experts, weights=weights_of(4), lam=-0.7, divisor=3.0)
    check(gpu, None, experts, weights=weights_of(4), lam=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(gaussian, shape, 3, dtype)
    check(gpu, base, experts, weights=[1.0] * 3, lam=0.3)
    check(gpu, None, experts, weights=[1.0] * 3, divisor=3.0, shift=1)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20, 33])
def test_every_number_of_experts(num_tasks: int, gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 100, num_tasks, dtype)
        check(gpu, base, experts, weights=weights_of(num_tasks), lam=0.3)


def test_the_bits_of_the_cpu(gpu: torch.device) -> None:
    for dtype in DTYPES:
        base, experts = inputs(gaussian, 9_000, 5, dtype)
        expected = torch.empty_like(base)
        torch.ops.surgery_kernels.linear_merge_out([base], experts, weights_of(5), lam=0.3, divisor=7.0, out=[expected])
        merged = merge(gpu, base, experts, weights=weights_of(5), lam=0.3, divisor=7.0)
        assert torch.equal(bits(merged), bits(expected))


def test_no_experts_and_outputs_that_overlap(gpu: torch.device) -> None:
    from surgery_kernels.triton.linear_merge import linear_merge_out

    with pytest.raises(RuntimeError, match=r"^experts must be at least one tensor, got none$"):
        linear_merge_out([], [], [1.0], out=[])
    x, buffer = torch.zeros(10, device=gpu), torch.zeros(15, device=gpu)
    message = r"^out must be apart from every other out, got memory that overlaps one$"
    with pytest.raises(RuntimeError, match=message):
        linear_merge_out([], [x, x.clone()], [1.0], out=[buffer[:10], buffer[5:]])


def test_a_captured_graph_has_no_place_for_errors(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import finite

    monkeypatch.setattr(finite, "is_capturing", lambda device: True)
    message = "nonfinite must be 'propagate' or 'drop' while a CUDA graph is captured, got 'error'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge(gpu, None, [torch.zeros(10)], weights=[1.0])


def test_tensors_of_several_devices(gpu: torch.device) -> None:
    from surgery_kernels.triton.linear_merge import linear_merge_out

    here, elsewhere = torch.zeros(10, device=gpu), torch.zeros(10, device="meta")
    message = f"experts must be on one device within one scope, {here.device}, got meta"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        linear_merge_out([], [here, elsewhere], [1.0], out=[here, elsewhere])
    message = f"experts[1] must be on the device of experts[0], {here.device}, got meta"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        linear_merge_out([], [here, elsewhere], [0.5, 0.5], out=[here])


def test_layouts(gpu: torch.device) -> None:
    from surgery_kernels.triton.linear_merge import linear_merge_out

    base, experts = inputs(gaussian, (31, 33), 3, torch.float32)
    moved = [x.to(gpu).t().contiguous().t() for x in (base, *experts)]
    out = torch.full((33, 62), 7.0, device=gpu)[:, ::2].t()
    linear_merge_out(moved[:1], moved[1:], [0.3] * 3, out=[out])
    assert_same(out.cpu(), reference.linear_merge(base, experts, weights=[0.3] * 3))


def test_many_tensors_of_several_dtypes_take_a_launch_per_dtype(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery_kernels.triton import linear_merge

    kernel = Counted(linear_merge._merge)
    monkeypatch.setattr(linear_merge, "_merge", kernel)
    bases, experts, expected = [], [], []
    for i, size in enumerate((0, 5, 5_000, 0, 100, 4_096, 8_193, 1)):
        base, of_tensor = inputs(gaussian, size, 3, (torch.float32, torch.bfloat16)[i % 2])
        expected.append(reference.linear_merge(base, of_tensor, weights=weights_of(3)))
        bases.append(base.to(gpu))
        experts += [expert.to(gpu) for expert in of_tensor]
    out = [torch.full_like(base, math.nan) for base in bases]
    linear_merge.linear_merge_out(bases, experts, weights_of(3), out=out)
    for merged, wanted in zip(out, expected, strict=True):
        assert_same(merged.cpu(), wanted)
    assert kernel.launches == 2


def test_nonfinite_values(gpu: torch.device) -> None:
    base, experts = inputs(grid, 100, 2, torch.float32)
    experts[1][[3, 5]] = torch.tensor([math.nan, math.inf])
    for nonfinite in ("drop", "propagate"):
        check(gpu, base, experts, weights=[1.0, 0.5], nonfinite=nonfinite)
        check(gpu, None, experts, weights=[1.0, 0.5], nonfinite=nonfinite)


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("base", "base must be finite, got 1 NaN or infinite values in tensor 'b'"),
        ("expert", "experts[1] must be finite, got 1 NaN or infinite values in tensor 'b'"),
        ("overflow", "experts[0] - base must be finite, got 1 overflows in tensor 'b'"),
    ],
)
def test_what_is_not_finite_is_named_and_nothing_is_written(which: str, message: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.linear_merge import linear_merge_out

    bases, experts = [], []
    for _ in range(2):
        base, of_tensor = inputs(grid, (30, 3), 2, torch.float16)
        bases.append(base.to(gpu))
        experts += [expert.to(gpu) for expert in of_tensor]
    if which == "base":
        bases[1][2] = torch.tensor([1.0, math.inf, 0.0])
    elif which == "expert":
        experts[3][29, 2] = math.nan
    else:
        bases[1][0, 0], experts[2][0, 0] = -60_000.0, 60_000.0
    out = [torch.full((30, 3), 7.0, dtype=torch.float16, device=gpu), torch.full_like(bases[1].t(), 7.0).t()]
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        linear_merge_out(bases, experts, [1.0, 0.5], names=["a", "b"], out=out)
    assert all((x == 7).all() for x in out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": "base"}, "out must be apart from every input, got memory that overlaps one"),
        ({"out": "expanded"}, "out must have memory for every element, got an expanded tensor"),
        ({"out": "twice"}, "out must be one tensor for every merged tensor, got 2"),
        ({"out": "half"}, "out must have the dtype of experts[0], got another"),
        ({"weights": [1.0] * 3}, "experts must be one tensor for every expert and merged tensor, got 2 for 3 experts"),
        ({"weights": []}, "experts must be one tensor for every expert and merged tensor, got 2 for 0 experts"),
        ({"base": "two"}, "base must be one tensor for every merged tensor, got 2 for 1"),
        ({"base": "longer"}, "base must have the shape of experts[0], got another"),
        ({"base": "integer"}, "base must be float64, float32, float16 or bfloat16, got torch.int64"),
    ],
    ids=str,
)
def test_refused(change: dict[str, Any], message: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.linear_merge import linear_merge_out

    base, *experts = (torch.zeros(100, device=gpu) for _ in range(3))
    fresh = torch.zeros(100, device=gpu)
    outs = {
        "base": [base],
        "expanded": [torch.zeros(1, device=gpu).expand(100)],
        "twice": [fresh, fresh],
        "half": [fresh.half()],
        "fresh": [fresh],
    }
    bases = {"two": [base, base], "longer": [torch.zeros(101, device=gpu)], "integer": [base.long()], "base": [base]}
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        linear_merge_out(
            bases[change.get("base", "base")],
            experts,
            change.get("weights", [1.0, 0.5]),
            out=outs[change.get("out", "fresh")],
        )
