"""The fake of the linear merge; the methods in surgery_kernels/merging call the op."""

import torch


@torch.library.register_fake("surgery_kernels::linear_merge_out")
def _(*_: object, **__: object) -> None:
    return None
