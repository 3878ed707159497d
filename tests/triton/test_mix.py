"""mix_out on CUDA tensors: the Triton kernels against the oracle and against the bits of the CPU."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import mix, reference
from surgery_kernels.ops.mix import num_blocks_of
from tests.cases import (
    DTYPES,
    KINDS,
    SHAPES,
    assert_same,
    bits,
    gaussian,
    generator,
    grid,
    inputs,
    option_id,
    weights_of,
)
from tests.guards import Counted, assert_border_kept, guarded

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]

AXES = ["tensor", "row", "column"]


def table(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(shape))


def ones(num_tasks: int) -> Tensor:
    return torch.ones(1, num_tasks, 1, dtype=torch.float64)


def check(
    gpu: torch.device, base: Tensor | None, experts: list[Tensor], coefficients: Tensor, shift: int = 0, **options: Any
) -> list[Tensor]:
    """coefficients: [num_outputs, num_tasks, num_blocks]."""
    from surgery_kernels.triton.mix import mix_out

    out = [guarded(torch.full_like(experts[0], math.nan), gpu, shift) for _ in coefficients]
    bases = [] if base is None else [guarded(base, gpu, shift)]
    mix_out(bases, [guarded(expert, gpu, shift) for expert in experts], coefficients, **options, out=out)
    if options.get("axis", "tensor") == "tensor":
        coefficients = coefficients[..., 0]
        if "base_coefficients" in options:
            options["base_coefficients"] = options["base_coefficients"][..., 0]
    expected = reference.mix(base, experts, coefficients, **options)
    for merged, wanted in zip(out, expected, strict=True):
        assert_border_kept(merged)
        assert_same(merged.cpu(), wanted, str(options))
    return [merged.cpu() for merged in out]


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(kind, 257, 4, dtype)
    coefficients = torch.tensor(weights_of(4), dtype=torch.float64).reshape(1, 4, 1)
    for fused in (False, True):
        check(gpu, base, experts, coefficients, divisor=-3.0, fused=fused)
        check(gpu, None, experts, coefficients, fused=fused)
        check(gpu, base, experts, coefficients, base_coefficients=table(1, 1), task_vectors=False, fused=fused)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", [*SHAPES, (20, 33), (2, 4_100), (3, 1)], ids=str)
def test_every_shape_and_axis(shape: tuple[int, ...], dtype: torch.dtype, gpu: torch.device) -> None:
    base, experts = inputs(gaussian, shape, 3, dtype)
    check(gpu, base, experts, table(1, 3, 1))
    check(gpu, None, experts, table(1, 3, 1), divisor=3.0, shift=1)
    for axis in ("row", "column"):
        blocks = num_blocks_of(shape, axis)
        check(gpu, base, experts, table(2, 3, blocks), base_coefficients=table(2, blocks), axis=axis)
        check(gpu, None, experts, table(1, 3, 1), axis=axis)


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20, 33])
def test_every_number_of_experts(num_tasks: int, gpu: torch.device) -> None:
    for dtype, fused in itertools.product(DTYPES, (False, True)):
        base, experts = inputs(gaussian, 100, num_tasks, dtype)
        check(gpu, base, experts, table(1, num_tasks, 1), fused=fused)


@pytest.mark.parametrize("num_outputs", [1, 2, 3, 8, 11])
def test_every_number_of_outputs(num_outputs: int, gpu: torch.device) -> None:
    for shape, axis in (((1_100,), "tensor"), ((5, 220), "row"), ((5, 220), "column")):
        base, experts = inputs(gaussian, shape, 3, torch.bfloat16)
        blocks = num_blocks_of(shape, axis)
        options = {"axis": axis, "base_coefficients": table(num_outputs, blocks)}
        check(gpu, base, experts, table(num_outputs, 3, blocks), **options)


@pytest.mark.parametrize("axis", AXES)
def test_the_bits_of_the_cpu(axis: str, gpu: torch.device) -> None:
    for dtype, fused in itertools.product(DTYPES, (False, True)):
        base, experts = inputs(gaussian, (9, 1_000), 5, dtype)
        coefficients = table(3, 5, num_blocks_of(base.shape, axis))
        merged = check(gpu, base, experts, coefficients, axis=axis, divisor=7.0, fused=fused)
        coefficients = coefficients[..., 0] if axis == "tensor" else coefficients
        expected = mix(base, experts, coefficients, axis=axis, divisor=7.0, fused=fused)
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(merged, expected, strict=True))


@pytest.mark.parametrize("num_tasks", [2, 5])
def test_in_place(num_tasks: int, gpu: torch.device) -> None:
    from surgery_kernels.triton.mix import mix_out

    for dtype, axis in itertools.product(DTYPES, AXES):
        base, experts = inputs(gaussian, (13, 501), num_tasks, dtype)
        coefficients = table(num_tasks, num_tasks, num_blocks_of(base.shape, axis))
        expected = reference.mix(base, experts, coefficients[..., 0] if axis == "tensor" else coefficients, axis=axis)
        moved = [x.to(gpu) for x in experts]
        mix_out([base.to(gpu)], moved, coefficients, axis=axis, out=moved[1:] + moved[:1])
        for merged, wanted in zip(moved[1:] + moved[:1], expected, strict=True):
            assert_same(merged.cpu(), wanted)
    base, experts = inputs(gaussian, (13, 51), 2, torch.float32)
    moved = [x.to(gpu).t().contiguous().t() for x in (base, *experts)]
    mix_out(moved[:1], moved[1:], ones(2), out=moved[:1])
    assert_same(moved[0].cpu(), reference.mix(base, experts, [1.0, 1.0]))


def test_no_experts_and_outputs_that_overlap(gpu: torch.device) -> None:
    from surgery_kernels.triton.mix import mix_out

    with pytest.raises(RuntimeError, match=r"^experts must be at least one tensor, got none$"):
        mix_out([], [], ones(1), out=[])
    x, buffer = torch.zeros(10, device=gpu), torch.zeros(15, device=gpu)
    message = r"^out must be apart from every other out, got memory that overlaps one$"
    with pytest.raises(RuntimeError, match=message):
        mix_out([], [x, x.clone()], ones(1), out=[buffer[:10], buffer[5:]])
    message = r"^out must be apart from every input, got memory that overlaps one$"
    for expert, out in ((buffer[:10], buffer[5:]), (buffer[5:], buffer[:10])):
        with pytest.raises(RuntimeError, match=message):
            mix_out([], [expert], ones(1), out=[out])
    square = torch.zeros(4, 4, device=gpu)
    with pytest.raises(RuntimeError, match=message):
        mix_out([], [square], ones(1), out=[square.t()])
    with pytest.raises(RuntimeError, match=message):  # the second tensor might be read after the first is written
        mix_out([], [x, x], ones(1), out=[x, x.clone()])


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("fresh", [True, False])
def test_what_is_not_finite_is_noticed_by_the_one_read(
    fresh: bool, dtype: torch.dtype, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an output is fresh and no input; else by a read before."""
    from surgery_kernels.triton import finite
    from surgery_kernels.triton.addresses import CHUNK
    from surgery_kernels.triton.mix import mix_out

    reads = Counted(finite._count_nonfinite)
    monkeypatch.setattr(finite, "_count_nonfinite", reads)
    base, experts = inputs(grid, CHUNK + 300, 2, dtype)
    moved = [x.to(gpu) for x in (base, *experts)]
    spoilt: list[tuple[int, float, float, bool, str]] = [  # entries of base and experts: whose, what, and the base's
        (0, math.inf, math.inf, True, "base must be finite, got 1 NaN or infinite values"),
        (0, math.nan, math.nan, False, "base must be finite, got 1 NaN or infinite values"),
        (2, -math.inf, 0.0, True, "experts[1] must be finite, got 1 NaN or infinite values"),
        (1, math.nan, 0.0, False, "experts[0] must be finite, got 1 NaN or infinite values"),
    ]
    if dtype.itemsize == 2:  # half a step beyond the largest number that is stored
        largest, beyond = (65_504.0, -16.0) if dtype == torch.float16 else (2.0**128 - 2.0**120, -(2.0**119))
        spoilt.append((1, largest, beyond, True, "experts[0] - base must be finite, got 1 overflows"))
    for index, value, of_base, task_vectors, message in spoilt:
        for place in (5, CHUNK + 299):
            given = [x.clone() for x in moved]
            given[0][place], given[index][place] = of_base, value
            out = torch.full_like(given[0], 7)
            with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
                mix_out(given[:1], given[1:], ones(2), task_vectors=task_vectors, fresh=fresh, out=[out])
            assert fresh or (out == 7).all()
    assert reads.launches == (0 if fresh else 2 * len(spoilt))
    out = torch.empty_like(moved[0])
    mix_out(moved[:1], moved[1:], ones(2), fresh=fresh, out=[out])
    assert_same(out.cpu(), reference.mix(base, experts, [1.0, 1.0]))
    moved[1][3] = math.nan
    with pytest.raises(RuntimeError, match=r"^experts\[0\] must be finite"):
        mix_out(moved[:1], moved[1:], ones(2), fresh=fresh, out=moved[:1])
    assert_same(moved[0].cpu(), base)


def test_a_captured_graph_has_no_place_for_errors(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import finite

    monkeypatch.setattr(finite, "is_capturing", lambda device: True)
    message = "nonfinite must be 'propagate' or 'drop' while a CUDA graph is captured, got 'error'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check(gpu, None, [torch.zeros(10)], ones(1))


def test_tensors_of_several_devices(gpu: torch.device) -> None:
    from surgery_kernels.triton.mix import mix_out

    here, elsewhere = torch.zeros(10, device=gpu), torch.zeros(10, device="meta")
    message = "experts must be on one device within one scope, got two"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        mix_out([], [here, elsewhere], ones(1), out=[here, elsewhere])
    message = "experts[1] must be on the device of experts[0], got another"
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        mix_out([], [here, elsewhere], ones(2), out=[here])


def test_layouts(gpu: torch.device) -> None:
    from surgery_kernels.triton.mix import mix_out

    base, experts = inputs(gaussian, (31, 33), 3, torch.float32)
    moved = [x.to(gpu).t().contiguous().t() for x in (base, *experts)]
    out = torch.full((33, 62), 7.0, device=gpu)[:, ::2].t()
    mix_out(moved[:1], moved[1:], 0.3 * ones(3), out=[out])
    assert_same(out.cpu(), reference.mix(base, experts, [0.3] * 3))


def test_many_tensors_of_several_dtypes_take_a_launch_per_dtype(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery_kernels.triton import mix as module

    kernel = Counted(module._mix)
    monkeypatch.setattr(module, "_mix", kernel)
    bases, experts, expected = [], [], []
    for i, size in enumerate((0, 5, 5_000, 0, 100, 4_096, 8_193, 1)):
        base, of_tensor = inputs(gaussian, size, 3, (torch.float32, torch.bfloat16)[i % 2])
        expected.append(reference.mix(base, of_tensor, weights_of(3)))
        bases.append(base.to(gpu))
        experts += [expert.to(gpu) for expert in of_tensor]
    out = [torch.full_like(base, math.nan) for base in bases]
    module.mix_out(bases, experts, torch.tensor(weights_of(3), dtype=torch.float64).reshape(1, 3, 1), out=out)
    for merged, wanted in zip(out, expected, strict=True):
        assert_same(merged.cpu(), wanted)
    assert kernel.launches == 2


def test_nonfinite_values(gpu: torch.device) -> None:
    base, experts = inputs(grid, 100, 2, torch.float32)
    experts[1][[3, 5]] = torch.tensor([math.nan, math.inf])
    for nonfinite in ("drop", "propagate"):
        check(gpu, base, experts, table(2, 2, 1), nonfinite=nonfinite)
        check(gpu, None, experts, table(2, 2, 1), nonfinite=nonfinite)


@pytest.mark.parametrize(
    ("which", "task_vectors", "message"),
    [
        ("base", True, "base must be finite, got 1 NaN or infinite values in tensor 'b'"),
        ("base", False, "base must be finite, got 1 NaN or infinite values in tensor 'b'"),
        ("expert", True, "experts[1] must be finite, got 1 NaN or infinite values in tensor 'b'"),
        ("expert", False, "experts[1] must be finite, got 1 NaN or infinite values in tensor 'b'"),
        ("overflow", True, "experts[0] - base must be finite, got 1 overflows in tensor 'b'"),
    ],
)
def test_what_is_not_finite_is_named_and_nothing_is_written(
    which: str, task_vectors: bool, message: str, gpu: torch.device
) -> None:
    from surgery_kernels.triton.mix import mix_out

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
        mix_out(bases, experts, ones(2), task_vectors=task_vectors, names=["a", "b"], out=out)
    assert all((x == 7).all() for x in out)
    if which == "overflow":
        mix_out(bases, experts, 0.25 * ones(2), task_vectors=False, out=out)
        assert (out[1][0, 0] == -45_000 + experts[3][0, 0] / 4).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": "rows"}, "axis must be one of 'tensor', 'row', 'column', got 'rows'"),
        ({"divisor": 0.0}, "divisor must not be 0, got 0"),
        ({"coefficients": ones(2).float()},
         "coefficients must be float64 [num_outputs, num_tasks, num_blocks], got another dtype or shape"),
        ({"coefficients": ones(2)[0]},
         "coefficients must be float64 [num_outputs, num_tasks, num_blocks], got another dtype or shape"),
        ({"coefficients": ones(2).to("meta")}, "coefficients must be on the CPU or on {device}, got meta"),
        ({"coefficients": ones(2)[:0]}, "coefficients must be of at least one output, got none"),
        ({"coefficients": ones(2).expand(1, 2, 3)}, "coefficients must be of 1 block or of 1, got 3"),
        ({"coefficients": ones(2).expand(1, 2, 3), "axis": "row"}, "coefficients must be of 1 block or of 10, got 3"),
        ({"coefficients": ones(3)},
         "experts must be one tensor for every expert and merged tensor, got 2 for 3 experts"),
        ({"coefficients": ones(2)[:, :0]},
         "experts must be one tensor for every expert and merged tensor, got 2 for 0 experts"),
        ({"base_coefficients": ones(2)[0]}, "base_coefficients must be float64 [1, 1], got another dtype or shape"),
        ({"base_coefficients": ones(1)[0], "base": []}, "base_coefficients must be None without base, got a tensor"),
        ({"base": [torch.zeros(10, 10)] * 2}, "base must be one tensor for every merged tensor, got 2 for 1"),
        ({"base": [torch.zeros(101)]}, "base must have the shape of experts[0], got another"),
        ({"base": [torch.zeros(100).long()]},
         "base must have the dtype of experts[0], got another"),
        ({"out": [torch.zeros(1, 1).expand(10, 10)]}, "out must have memory for every element, got an expanded tensor"),
        ({"out": [torch.zeros(10, 10)] * 2}, "out must be one tensor for every merged tensor, got 2"),
        ({"coefficients": ones(2).expand(3, 2, 1)}, "out must be 3 tensors for every merged tensor, got 1 for 1"),
        ({"out": [torch.zeros(10, 10).half()]}, "out must have the dtype of experts[0], got another"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(change: dict[str, Any], message: str, gpu: torch.device) -> None:
    from surgery_kernels.triton.mix import mix_out

    base, *experts, out = (torch.zeros(10, 10, device=gpu) for _ in range(4))
    given = {"base": [base], "experts": experts, "coefficients": ones(2), "out": [out], **change}
    for name in {"base", "out"} & set(change):
        given[name] = [x.to(gpu) if x.stride() != (0, 0) else x[:1, :1].to(gpu).expand(x.shape) for x in change[name]]
    error = ValueError if "axis" in change and message.startswith("axis") else RuntimeError
    with pytest.raises(error, match=f"^{re.escape(message.format(device=experts[0].device))}$"):
        mix_out(**given)
