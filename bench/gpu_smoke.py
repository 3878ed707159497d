"""Every op once on CUDA tensors, by Triton and by CUDA where it has kernels, against the CPU; a line for each.

python bench/gpu_smoke.py [--dry-run]    # dry: on the CPU, with few elements
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import surgery_kernels as sk
from surgery_kernels import _C

COUNT = 3_000_003
DTYPES = (torch.float32, torch.bfloat16)

Op = Callable[..., Any]


@dataclass(frozen=True)
class Check:
    """call(ops, *inputs): `ops` are those of Triton, or those of CUDA where `has_cuda`."""

    name: str
    call: Op
    inputs: tuple[Any, ...]
    has_cuda: bool = False

    @property
    def dtype(self) -> str:
        return str(flat(self.inputs)[0].dtype).removeprefix("torch.")


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in flat(part)]


def on(device: torch.device, inputs: Any) -> Any:
    return inputs.to(device) if isinstance(inputs, Tensor) else [on(device, x) for x in inputs]


def merging(dtype: torch.dtype, count: int) -> Iterator[Check]:
    base = torch.randn(count, dtype=dtype)
    experts = [base + torch.randn(count).mul(0.01).to(dtype) for _ in range(4)]
    density, inputs = [0.2] * 4, (base, experts)
    mergekit = {"semantics": "mergekit", "rescale": True}
    yield Check("ties_merge", lambda ops, b, e: ops.ties_merge(b, e, density), inputs, True)
    yield Check("mergekit", lambda ops, b, e: ops.ties_merge(b, e, density, **mergekit), inputs, True)
    yield Check("ties_split", lambda ops, b, e: ops.ties_split(b, e, density), inputs, True)
    yield Check("ties_merge_out", merged_tensors, inputs, True)
    yield Check("trim_thresholds", lambda ops, b, e: ops.trim_thresholds(b, e, density), inputs, True)
    # a cut may lie anywhere between two ties
    yield Check("trim_limits", lambda ops, b, e: ops.trim_limits([b], e, density, "mergekit")[0], inputs, True)
    yield Check("mix", lambda _, b, e: sk.mix(b, e, [0.3] * 4), inputs)
    yield Check("weighted_merge", lambda _, b, e: sk.weighted_merge(b, e, [x.abs() for x in e]), inputs)
    yield Check("pcb_merge", lambda _, b, e: sk.pcb_merge(b, e, density=0.2), inputs)
    yield Check("masks", lambda ops, b, e: ops.masks([b], e, density), inputs)
    yield Check("gram", lambda _, b, e: sk.gram(b, e), inputs)
    yield Check("census", lambda ops, b, e: ops.census([b], e, len(e)), inputs)
    yield Check("steps", stepped, inputs)
    yield Check("steps_limits", lambda _, b, e: distance(stores=True).limits([b, e[0]], [1, 300, -300])[0], inputs)
    yield Check("combine", combined, inputs)
    yield Check("combine, masked", masked, inputs)
    yield Check("combine, groups", grouped, inputs)
    if dtype == torch.float32:  # so large that it is read once
        base = torch.randn(5 * count)
        experts = [base + torch.randn(5 * count).mul(0.01) for _ in range(4)]
        yield Check("one read", lambda ops, b, e: ops.ties_merge(b, e, density), (base, experts), True)


def merged_tensors(ops: Any, base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    """One scope of two tensors."""
    parts = [base[:1001], base[1001:]]
    of_parts = [part for cut in (slice(1001), slice(1001, None)) for part in (expert[cut] for expert in experts)]
    out = [torch.empty_like(part) for part in parts]
    ops.ties_merge_out(parts, of_parts, [0.2] * 4, out=out)
    return out


def distance(stores: bool) -> sk.Steps:
    steps = sk.Steps(2)
    difference = abs(steps.load(1) - steps.load(0))
    if stores:
        steps.store(difference.sqrt())
    else:
        steps.sum(difference)
    return steps


def stepped(_: Any, base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    """With an output, and with sums of every row."""
    out = torch.empty_like(base)
    distance(stores=True).run([base, experts[0]], out=[out])
    rows = [x[: len(x) // 10 * 10].view(10, -1) for x in (base, experts[0])]
    return [out, distance(stores=False).run(rows, axis="row")]


def combined(_: Any, base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    return with_gradients(base, experts, torch.full((4, 1), 0.3))


def masked(_: Any, base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    logits = torch.zeros(len(base), device=base.device, requires_grad=True)
    return with_gradients(base, experts, torch.full((4, 1), 0.3), mask_logits=logits, seed=1)


def grouped(_: Any, base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    return with_gradients(base, experts, torch.full((4, 1, 3), 0.3))


def with_gradients(base: Tensor, experts: list[Tensor], coefficients: Tensor, **options: Any) -> list[Tensor]:
    coefficients = coefficients.to(base.device).requires_grad_()
    merged = sk.combine(base, experts, coefficients, torch.tensor([0, len(base)], device=base.device), **options)
    leaves = [coefficients, *(x for x in options.values() if isinstance(x, Tensor))]
    return [merged.detach(), *torch.autograd.grad(merged.float().sum(), leaves)]


def surgery(dtype: torch.dtype) -> Iterator[Check]:
    down, up = torch.randn(2, 16, 128) * 0.1, torch.randn(2, 128, 16) * 0.1
    features = torch.randn(2, 64, 128).to(dtype)
    yield Check("surgery_adapter", corrected, (features, down, up))
    yield Check("surgery_train", trained, (features, down, up, torch.randint(64, (5, 2, 16))))
    yield Check("gram_cross", lambda _, x: sk.gram_cross(x, x[..., :16].contiguous()), (features,))


def corrected(_: Any, features: Tensor, down: Tensor, up: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (features, down, up)]
    loss = sk.representation_loss(sk.surgery_adapter(*leaves), torch.zeros_like(features)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def trained(_: Any, features: Tensor, down: Tensor, up: Tensor, indices: Tensor) -> Tensor:
    """The losses of five steps, each with the adapters of the steps before."""
    moments = [x.new_zeros(2, *x.shape) for x in (down, up)]
    adapters = [x.clone() for x in (down, up)]
    return sk.surgery_train(list(features), list(features + 1), *adapters, *moments, indices, lr=0.01)


def checks(count: int) -> Iterator[Check]:
    for dtype in DTYPES:
        yield from merging(dtype, count)
    for dtype in DTYPES:
        yield from surgery(dtype)


def run(dry: bool) -> int:
    torch.manual_seed(0)
    device = torch.device("cpu" if dry else "cuda")
    failed = 0
    for check in checks(1_003 if dry else COUNT):
        backends = {"triton": torch.ops.surgery_kernels}
        if check.has_cuda and _C.build_info()["cuda"] and not dry:
            backends["cuda"] = torch.ops.surgery_kernels_cuda
        moved = on(device, check.inputs)
        expected = flat(check.call(torch.ops.surgery_kernels, *check.inputs))
        for backend, ops in backends.items():
            try:
                for x, y in zip(flat(check.call(ops, *moved)), expected, strict=True):
                    torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-4, equal_nan=True)
                said = "as the CPU"
            except Exception as error:  # one op that fails must not hide the others
                failed += 1
                said = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{check.name:16} {backend:6} {check.dtype:8} {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run(dry="--dry-run" in sys.argv))
