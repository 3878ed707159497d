"""What is compiled ahead of time of mix."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from surgery_kernels.triton.mix import mix_out

from . import Launch


def launches() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16):
        experts = [torch.zeros(1 << 7, 1 << 7, dtype=dtype) for _ in range(8)]
        outs = [torch.zeros_like(experts[0]) for _ in range(8)]
        numbers = torch.full((8, 8, 1 << 7), 0.3, dtype=torch.float64)
        yield Launch(
            f"{dtype}, 8 experts",
            lambda: mix_out([experts[0]], experts, numbers[:1, :, :1], fresh=True, out=outs[:1]),  # noqa: B023
            wide=("_mix",),
        )
        yield Launch(
            f"{dtype}, 8 experts, fused, without a base",
            lambda: mix_out([], experts, numbers[:1, :, :1], fused=True, nonfinite="drop", out=outs[:1]),  # noqa: B023
            wide=("_mix",),
        )
        yield Launch(
            f"{dtype}, 8 experts, without a base",
            lambda: mix_out([], experts, numbers[:1, :, :1], fresh=True, out=outs[:1]),  # noqa: B023
            wide=("_mix",),
        )
        yield Launch(
            f"{dtype}, 8 experts, 8 outputs in place",
            lambda: mix_out([outs[0]], experts, numbers[..., :1], out=experts),  # noqa: B023
            wide=("_mix", "_count_nonfinite"),
        )
        for axis in ("row", "column"):
            yield Launch(
                f"{dtype}, 8 experts, a coefficient per {axis}",
                lambda: mix_out([experts[0]], experts, numbers[:1], axis=axis, fresh=True, out=outs[:1]),  # noqa: B023
            )
