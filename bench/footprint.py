"""What a merge takes besides time, measured where nothing else runs: a process of its own.

python footprint.py CONTENDER DTYPE NUM_PARAMS prints peak_extra_bytes and bytes_moved, null where it cannot be known.
CONTENDER is a key of BASELINES or ours-<semantics>; NUM_PARAMS "model" is the state dict of ViT-B/32.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from baselines import BASELINES, DENSITY, Merge, ours
from inputs import Inputs, flat_inputs, num_params_of, state_dict, vit_b32_shapes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from surgery_kernels import _C, merge_state_dicts

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COUNTED = 1 << 20  # parameters; the bytes of every operation grow with their number


def footprint(contender: str, dtype: str, num_params: int | str) -> dict[str, float | None]:
    command = [sys.executable, __file__, contender, dtype, str(num_params)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


class Peak:
    """How far resident memory rises from here on."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
        self.before = resident("VmRSS")

    def beyond(self, output: Sequence[Tensor]) -> int:
        return resident("VmHWM") - self.before - sum(x.nbytes for x in output)


class TensorTraffic(TorchDispatchMode):
    """Adds up the bytes of every operation's inputs and outputs: what it reads and writes at the least.

    What a sort or a selection moves inside itself is not seen.
    """

    ALLOCATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
    OVERWRITE = ("copy_", "fill_", "zero_")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.ALLOCATE:
            read = list(tensors_of((args, kwargs)))
            written = list(tensors_of(result)) or read[:1]
            self.bytes += sum(x.nbytes for x in (read[1:] if name in self.OVERWRITE else read) + written)
        return result


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def tensor_traffic(call: Callable[[], Tensor]) -> int:
    with TensorTraffic() as traffic:
        call()
    return traffic.bytes


def native_traffic(call: Callable[[], list[Tensor]]) -> int:
    before = _C.bytes_read()
    return sum(x.nbytes for x in call()) + _C.bytes_read() - before


def merge_of(contender: str) -> tuple[Merge, bool]:
    name, _, semantics = contender.partition("-")
    if name == "ours":
        return ours(semantics), semantics != "peft"
    return BASELINES[name].make(), BASELINES[name].takes_base


def merge_model(base: Tensor, experts: list[Tensor]) -> list[Tensor]:
    shapes = vit_b32_shapes()
    named = [state_dict(x, shapes) for x in (base, *experts)]
    return list(merge_state_dicts(named[0], named[1:], density=DENSITY).values())


def main(contender: str, dtype: str, num_params: str) -> dict[str, float | None]:
    merge, takes_base = merge_of(contender)
    native = contender.startswith("ours")
    size = num_params_of(vit_b32_shapes()) if num_params == "model" else int(num_params)

    def inputs(n: int) -> Inputs:
        return flat_inputs(n, DTYPES[dtype], takes_base)

    base, experts = inputs(size)
    # what is loaded and started once is no memory of the merge; what is compiled, is so for one size
    merge(*((base, experts) if contender == "compiled" else inputs(1 << 12)))

    def call() -> list[Tensor]:
        return merge_model(base, experts) if native and num_params == "model" else [merge(base, experts)]

    peak_extra_bytes = None
    if sys.platform == "linux":
        peak = Peak()
        peak_extra_bytes = peak.beyond(call())
    if contender == "compiled":
        return {"peak_extra_bytes": peak_extra_bytes, "bytes_moved": None}
    if native:
        return {"peak_extra_bytes": peak_extra_bytes, "bytes_moved": native_traffic(call)}
    few = min(size, COUNTED)
    small_base, small_experts = inputs(few)
    traffic = tensor_traffic(lambda: merge(small_base, small_experts)) * (size / few)
    return {"peak_extra_bytes": peak_extra_bytes, "bytes_moved": traffic}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
