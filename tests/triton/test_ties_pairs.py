"""bfloat16 in pairs: what is chosen where, the same bits as one at a time, and what the instructions for them do."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="there is no Triton for this platform")
import triton.language as tl  # noqa: E402

from surgery_kernels.triton.ties_pairs import above_limit, subtracted, votes_of  # noqa: E402
from tests.cases import SEMANTICS, bits, densities_of, equal, gaussian, grid, inputs, leaning_down  # noqa: E402

pytestmark = [pytest.mark.any_isa, pytest.mark.usefixtures("gpu")]


def test_what_is_chosen() -> None:
    from surgery_kernels.triton.ties_pairs import pairs_for, pairs_on

    chosen = {("cuda", 75): "", ("cuda", 80): "sm_80", ("cuda", 89): "sm_80", ("cuda", 90): "sm_90",
              ("cuda", 120): "sm_90", ("hip", "gfx942"): ""}  # fmt: skip
    for (backend, arch), pairs in chosen.items():
        assert pairs_on(SimpleNamespace(backend=backend, arch=arch)) == pairs
    wanted = pairs_on(SimpleNamespace(backend="cuda", arch=10 * torch.cuda.get_device_capability()[0])
                      ) if torch.cuda.is_available() else "integers"  # fmt: skip
    assert pairs_for(255) == wanted
    assert pairs_for(256) == ""


@pytest.mark.parametrize("one_at_a_time", [False, True])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_bits_of_the_cpu(
    semantics: str, one_at_a_time: bool, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery_kernels.triton import ties_merge

    if one_at_a_time:
        monkeypatch.setattr(ties_merge, "pairs_for", lambda num_tasks: "")
    for kind, size, num_tasks in ((gaussian, 1_100, 5), (leaning_down, 1_024, 4), (equal, 1_024, 3), (grid, 1_024, 1)):
        base, experts = inputs(kind, size, num_tasks, torch.bfloat16)
        experts[0][:3] = torch.tensor([math.nan, math.inf, -math.inf]).bfloat16()
        for with_base in (True, False):
            bases = [base] if with_base else []
            options = {"semantics": semantics, "nonfinite": "propagate", "lam": 0.3}
            expected, out = torch.empty_like(base), torch.empty_like(base, device=gpu)
            torch.ops.surgery_kernels.ties_merge_out(bases, experts, densities_of(num_tasks), **options, out=[expected])
            ties_merge.ties_merge_out(
                [x.to(gpu) for x in bases], [x.to(gpu) for x in experts], densities_of(num_tasks), **options, out=[out]
            )
            same = (bits(out.cpu()) == bits(expected)) | (out.cpu().isnan() & expected.isnan())
            assert same.all(), f"{kind.__name__} {with_base}"


def special_pairs() -> list[Tensor]:
    """bfloat16 against bfloat16, an even number of each."""
    g = torch.Generator().manual_seed(0)
    special = [0x0000, 0x8000, 0x0001, 0x8001, 0x3F80, 0xBF80, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF]
    found = torch.tensor(special + torch.randint(0, 1 << 16, (116,), generator=g).tolist(), dtype=torch.int32)
    return [
        x.to(torch.int16).view(torch.bfloat16).contiguous() for x in (found.repeat(128), found.repeat_interleave(128))
    ]


def words(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.int16).numpy().view(np.uint32)


def halves(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.uint32).view(np.int16)).view(torch.bfloat16)


def permute(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """prmt: four bytes of eight; a nibble's highest bit asks for a byte's sign in all its bits."""
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    found = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = (both >> np.uint64(8 * (nibble & 7)) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(byte >= 0x80, 0xFF, 0).astype(np.uint32) if nibble & 8 else byte
        found |= byte << np.uint32(8 * i)
    return found


def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """set.gtu: larger or unordered, all bits of a half."""
    x, y = halves(a), halves(b)
    return words(torch.where(~(x <= y), -1, 0).to(torch.int16).view(torch.bfloat16))


INSTRUCTIONS = {
    "mov.b32": lambda x: x,
    "fma.rn.bf16x2": lambda a, b, c: words((halves(a).double() * halves(b).double() + halves(c).double()).bfloat16()),
    "abs.bf16x2": lambda a: words(halves(a).abs()),
    "set.gtu.u32.bf16x2": compare,
    "prmt.b32": lambda a, b, selector: permute(a, b, int(selector[0])),
}


def run(ptx: str, *arguments: np.ndarray) -> np.ndarray:
    registers = {f"${i}": x for i, x in enumerate(arguments, 1)}
    for statement in filter(None, map(str.strip, ptx.strip("{ }").split(";"))):
        if statement.startswith(".reg"):
            continue
        name, _, operands = statement.partition(" ")
        to, *of = map(str.strip, operands.split(","))
        values = [np.full_like(arguments[0], int(x, 16)) if x.startswith("0x") else registers[x] for x in of]
        registers[to] = INSTRUCTIONS[name](*values)
    return registers["$0"]


@triton.jit
def _integers(x, y, kept, out, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    a, b, c = tl.load(x + lanes), tl.load(y + lanes), tl.load(kept + lanes)
    tl.store(out + lanes, subtracted(a, b, "integers"))
    tl.store(out + SIZE + lanes, above_limit(a, b, "integers"))
    tl.store(out + 2 * SIZE + lanes, votes_of(a, c, "integers"))


def by_integers(x: np.ndarray, y: np.ndarray, kept: np.ndarray) -> np.ndarray:
    given = [torch.from_numpy(values.view(np.int32).copy()) for values in (x, y, kept)]
    out = torch.empty(3, len(x), dtype=torch.int32)
    _integers[(1,)](*given, out, SIZE=len(x))
    return out.numpy().view(np.uint32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own instructions are tested by merges")
def test_the_instructions_do_what_the_integers_do() -> None:
    from surgery_kernels.triton import ties_pairs

    subtract, compare, vote = re.findall(r'"(\{ \.reg.*\}|prmt.*;)"', Path(ties_pairs.__file__).read_text())
    x, y = map(words, special_pairs())
    limits = words(torch.nan_to_num(halves(y), nan=math.inf).abs())
    kept = run(compare, x, limits)
    differences, _, _ = by_integers(x, y, kept)
    found, expected = halves(run(subtract, x, y)), halves(differences)
    assert ((found == expected) | (found.isnan() & expected.isnan())).all()
    _, mask, votes = by_integers(x, limits, kept)
    assert np.array_equal(kept, mask)
    assert np.array_equal(run(vote, x, kept), votes)
