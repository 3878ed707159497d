"""Lists of tensors as C++ describes them, against the same in Python."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.any_isa

lists = torch.ops.surgery_kernels_lists
CHUNK = 100


def rows_of(
    base: Sequence[Tensor], experts: Sequence[Tensor], num_tasks: int, out: Sequence[Tensor], places: Sequence[Any]
) -> dict[torch.dtype, list[list[int]]]:
    """The rows of addresses.py, of contiguous tensors."""
    rows: dict[torch.dtype, list[list[int]]] = {}
    chunks: dict[torch.dtype, int] = {}
    numel = num_chunks = 0
    num_outputs = len(out) * num_tasks // len(experts)
    for part, first in enumerate(experts[::num_tasks]):
        outputs = [x.data_ptr() for x in out[part * num_outputs : (part + 1) * num_outputs]]
        addresses = [outputs[0] if outputs else 0, base[part].data_ptr() if base else 0]
        addresses += [x.data_ptr() for x in experts[part * num_tasks : (part + 1) * num_tasks]]
        addresses += outputs if places else []
        aligned = all(x % 16 == 0 for x in addresses)
        row = [first.numel(), numel, chunks.get(first.dtype, 0), num_chunks, int(aligned), *addresses]
        row += places[part] if places else []
        rows.setdefault(first.dtype, []).append(row + [0] * (len(row) % 2))
        count = -(-first.numel() // CHUNK)
        chunks[first.dtype] = chunks.get(first.dtype, 0) + count
        numel, num_chunks = numel + first.numel(), num_chunks + count
    return rows


def tensors(num: int, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float32)) -> list[Tensor]:
    """For three merged tensors, one of them empty and one of them at an odd address."""
    buffers = [torch.zeros(251, dtype=dtype) for dtype in dtypes]
    return [
        x.clone() if i != 1 else torch.zeros(121, dtype=x.dtype)[1:]
        for i, x in enumerate((buffers[0], buffers[1][1:121], buffers[2][:0]))
        for _ in range(num)
    ]


@pytest.mark.parametrize("num_outputs", [0, 1, 3])
@pytest.mark.parametrize("num_tasks", [1, 4])
@pytest.mark.parametrize("has_base", [False, True])
def test_rows(num_tasks: int, num_outputs: int, has_base: bool) -> None:
    base, experts = tensors(1) if has_base else [], tensors(num_tasks)
    out = tensors(num_outputs) if num_outputs else None
    places = [[i, 7, -1] for i in range(3)] if num_outputs else []
    numbers = [0.1, -0.0, 1e300]
    words, copies, filled, (numel, num_chunks, in_place, *layout) = lists.addresses(
        base, experts, num_tasks, out, max(1, num_outputs), False, sum(places, []), [], numbers, CHUNK
    )
    rows = rows_of(base, experts, num_tasks, out or [], places)
    flat = [word for of_dtype in rows.values() for row in of_dtype for word in row]
    assert words.dtype == torch.int64 and words.tolist()[: len(flat)] == flat
    assert words[len(flat) :].view(torch.float64).tolist() == numbers
    assert (numel, num_chunks, in_place) == (251 + 120, 3 + 2, 0)
    assert copies == filled == []
    of_bfloat16 = rows[torch.bfloat16][0]
    assert layout == [2, len(flat) - len(of_bfloat16), 3, 1, len(of_bfloat16), 2]
    assert of_bfloat16[4] == 0 and rows[torch.float32][0][4] == 1


def test_copies_of_what_is_not_contiguous() -> None:
    square = torch.arange(12.0).view(3, 4).t()
    out = torch.full((4, 6), 7.0)[:, ::2]
    words, copies, filled, (*_, size, _) = lists.addresses([square], [square, square.contiguous()], 2, [out], 1, False,
                                                           [], [], [], CHUNK)  # fmt: skip
    assert size == len(words) == 10
    assert [x.data_ptr() for x in copies] == words[6:8].tolist()
    assert all(torch.equal(x, square) and x.is_contiguous() for x in copies)
    (instead,) = filled
    assert instead.data_ptr() == words[5] and instead.is_contiguous() and instead.shape == out.shape


def test_an_output_that_is_an_input() -> None:
    x, y = torch.zeros(5), torch.zeros(5)
    place = [0, 1, 1]
    for out, expected in ((x, 1), (torch.zeros(5), 0)):
        *_, (_, _, in_place, *_) = lists.addresses([], [x, y], 2, [out], 1, False, place, [], [], CHUNK)
        assert in_place == expected
    stacked = torch.zeros(2, 5)
    *_, (_, _, in_place, *_) = lists.addresses([], [x, y], 2, [stacked], 1, True, [], [], [], CHUNK)
    assert in_place == 0


def test_outputs_that_are_bits() -> None:
    x, buffer = torch.zeros(9), torch.zeros(20, dtype=torch.uint8)
    bits = buffer[1:3]
    for out, places, packed in (([bits, x.clone()], [0, 1], [0]), ([x.clone(), bits], [0, 1], [1])):
        words, *_ = lists.addresses([], [x], 1, out, 2, False, places, packed, [], CHUNK)
        assert words.tolist() == [9, 0, 0, 0, 1, out[0].data_ptr(), 0, x.data_ptr(), *(y.data_ptr() for y in out), 0, 1]
    message = "out must be contiguous uint8 [2] on the device of experts[0] for bits, got another tensor"
    for wrong in (buffer[:3], buffer[:4:2], bits.view(torch.int8), x, torch.zeros(2, dtype=torch.uint8, device="meta")):
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            lists.addresses([], [x], 1, [wrong], 1, False, [0, 1], [0], [], CHUNK)
    with pytest.raises(RuntimeError, match=r"^out must be apart from every input, got memory that overlaps one$"):
        lists.addresses([], [x], 1, [x.view(torch.uint8)[:2]], 1, False, [0, 1], [0], [], CHUNK)


X, LONG, META = torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.zeros(4, device="meta")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([], [X], 0, None), "experts must be one tensor for every expert and merged tensor, got 1 for 0 experts"),
        (([], [X] * 3, 2, None), "experts must be one tensor for every expert and merged tensor, got 3 for 2 experts"),
        (([], [], 2, None), "experts must be at least one tensor, got none"),
        (([X], [X] * 4, 2, None), "base must be one tensor for every merged tensor, got 1 for 2"),
        (([], [LONG], 1, None), "experts must be float64, float32, float16 or bfloat16, got another dtype"),
        (([], [X, X.double()], 1, None), "experts must be all float64 or none within one scope, got both"),
        (([], [X, META], 1, None), "experts must be on one device within one scope, got two"),
        (([], [X, META], 2, None), "experts[1] must be on the device of experts[0], got another"),
        (([], [X, X.half()], 2, None), "experts[1] must have the dtype of experts[0], got another"),
        (([X[:3]], [X], 1, None), "base must have the shape of experts[0], got another"),
        (([], [X], 1, []), "out must be one tensor for every merged tensor, got 0"),
        (([], [X], 1, [X[:3]]), "out must have the shape of experts[0], got another"),
        (([], [X], 1, [X]), "out must be apart from every input, got memory that overlaps one"),
    ],
    ids=str,
)
def test_addresses_refuse(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        lists.addresses(*given, 1, False, [], [], [], CHUNK)


def test_the_first_of_tied_tensors() -> None:
    x, y = torch.zeros(6), torch.zeros(6)
    views = [x, x.view(2, 3), x, x.view(torch.int32), x.view(3, 2).t(), torch.zeros(0), torch.zeros(0), x]
    others = [y, y.view(2, 3), y.clone(), y.view(torch.int32), y.view(3, 2).t(), torch.zeros(0), torch.zeros(0), y]
    assert lists.first_of_tied(views, 1) == [0, 1, 0, 3, 4, 5, 6, 0]
    both = [tensor for pair in zip(views, others, strict=True) for tensor in pair]
    assert lists.first_of_tied(both, 2) == [0, 1, 2, 3, 4, 5, 6, 0]
    assert lists.first_of_tied([], 3) == []
    with pytest.raises(RuntimeError, match=r"^tensors must be num_models for every name, got 3 for 2$"):
        lists.first_of_tied([x, y, x], 2)


@pytest.mark.parametrize("other", [torch.zeros(5), torch.zeros(2, 2), LONG, META, X.to(torch.float8_e5m2)], ids=str)
def test_unlike_tensors_are_not_tied(other: Tensor) -> None:
    assert lists.first_of_tied([X, X, X, other], 2) == []
    assert lists.first_of_tied([X, X, other, other], 2) == [0, 1]
