"""Every op once on CUDA tensors, by Triton and by CUDA where it has kernels, against the CPU; a line for each.

python bench/gpu_smoke.py [--dry-run]    # dry: on the CPU, with few elements
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import surgery_kernels as sk
from surgery_kernels import _C

DRY = "--dry-run" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
COUNT = 1_003 if DRY else 3_000_003

Op = Callable[..., Any]


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for part in result for x in flat(part)]


def merging(dtype: torch.dtype) -> Iterator[tuple[str, Op, bool, tuple[Any, ...]]]:
    base = torch.randn(COUNT, dtype=dtype)
    experts = [base + torch.randn(COUNT).mul(0.01).to(dtype) for _ in range(4)]
    density, inputs = [0.2] * 4, (base, experts)
    yield "ties_merge", lambda ops, b, e: ops.ties_merge(b, e, density), True, inputs
    yield "mergekit", lambda ops, b, e: ops.ties_merge(b, e, density, semantics="mergekit", rescale=True), True, inputs
    yield "trim_thresholds", lambda ops, b, e: ops.trim_thresholds(b, e, density), True, inputs
    yield "mix", lambda _, b, e: sk.mix(b, e, [0.3] * 4), False, inputs
    yield "masks", lambda ops, b, e: ops.masks([b], e, density), False, inputs
    yield "gram", lambda _, b, e: sk.gram(b, e), False, inputs
    yield "combine", combined, False, inputs


def combined(_: Any, base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    coefficients = torch.full((4, 1), 0.3, device=base.device, requires_grad=True)
    merged = sk.combine(base, experts, coefficients, torch.tensor([0, len(base)], device=base.device))
    return [merged.detach(), *torch.autograd.grad(merged.float().sum(), [coefficients])]


def corrected(_: Any, features: Tensor, down: Tensor, up: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (features, down, up)]
    loss = sk.representation_loss(sk.surgery_adapter(*leaves), torch.zeros_like(features)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def run() -> int:
    torch.manual_seed(0)
    failed = 0
    calls = [(dtype, *call) for dtype in (torch.float32, torch.bfloat16) for call in merging(dtype)]
    adapter = (torch.randn(2, 64, 128), torch.randn(2, 16, 128) * 0.1, torch.randn(2, 128, 16) * 0.1)
    calls.append((torch.float32, "surgery_adapter", corrected, False, adapter))
    for dtype, name, op, has_cuda, inputs in calls:
        backends = {"triton": torch.ops.surgery_kernels}
        if has_cuda and _C.build_info()["cuda"] and not DRY:
            backends["cuda"] = torch.ops.surgery_kernels_cuda
        moved = [[x.to(DEVICE) for x in part] if isinstance(part, list) else part.to(DEVICE) for part in inputs]
        expected = flat(op(torch.ops.surgery_kernels, *inputs))
        for backend, ops in backends.items():
            try:
                for x, y in zip(flat(op(ops, *moved)), expected, strict=True):
                    torch.testing.assert_close(x.cpu(), y, rtol=1e-3, atol=1e-4, equal_nan=True)
                said = "as the CPU"
            except Exception as error:  # one op that fails must not hide the others
                failed += 1
                said = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"{name:16} {backend:6} {str(dtype).removeprefix('torch.'):8} {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run())
