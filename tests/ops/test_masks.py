"""masks against the oracle, which draws Philox in plain integers and sums in the one order."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from surgery_kernels import _C, gram, masks, reference
from surgery_kernels.ops.masks import pack, unpack
from tests.cases import (
    DTYPES,
    KINDS,
    NUM_TASKS,
    SHAPES,
    assert_same,
    equal,
    gaussian,
    generator,
    grid,
    inputs,
    option_id,
    rows,
)

RULES: list[dict[str, Any]] = [{"rule": "random"}, {"rule": "della", "epsilon": [0.1, 0.2, 0.05]}]
DENSITY = [0.3, 1.0, 0.6]
# a slab of 9 rows, of tiles of 16 columns, and shapes whose rows start within a byte
ROWS = [(1, 5), (5, 1), (300, 7), (7, 300), (2, 9, 40), (5, 3, 2, 7), (1, 65_600), (33_000, 3)]


def check(base: Tensor | None, experts: list[Tensor], **options: Any) -> None:
    bits, sums = masks(base, experts, **options)
    kept, expected = reference.masks(base, experts, **options)
    assert bits.shape == (len(experts), -(-experts[0].numel() // 8))
    assert torch.equal(bits, pack(kept)), str(options)
    assert_same(sums, expected, str(options))


@pytest.mark.parametrize("options", RULES, ids=option_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("kind", KINDS, ids=option_id)
def test_every_kind_of_data(kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    base, experts = inputs(kind, (30, 41), 3, dtype)
    check(base, experts, density=DENSITY, seed=3, **options)
    check(None, experts, density=DENSITY, seed=3, **options)


@pytest.mark.parametrize("options", RULES, ids=option_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]) -> None:
    base, experts = inputs(gaussian, shape, 3, dtype)
    check(base, experts, density=DENSITY, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_ranks_run_along_the_second_dimension(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind in (gaussian, grid, equal):
        base, experts = inputs(kind, shape, 2, dtype)
        check(base, experts, density=[0.5, 0.2], rule="della", epsilon=[0.4, 0.1])


LONG = 400_003  # entries of a row: more than are sorted at once


def clustered(n: int, num_tasks: int, dtype: torch.dtype, g: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """All magnitudes next to one number, as steps of one size are."""
    steps = [1 + torch.rand(n, generator=g, dtype=torch.float64) * 2**-20 for _ in range(num_tasks)]
    signs = [torch.randint(0, 2, (n,), generator=g) * 2 - 1 for _ in range(num_tasks)]
    return torch.zeros(n, dtype=dtype), [(step * sign).to(dtype) for step, sign in zip(steps, signs, strict=True)]


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("kind", "dtype", "epsilon"),
    [
        (gaussian, torch.float32, 0.3),
        (gaussian, torch.bfloat16, -0.1),
        (clustered, torch.float32, 0.45),
        (clustered, torch.float64, 0.49),  # more entries than are ranked at a time
        (grid, torch.float16, 0.2),
    ],
    ids=option_id,
)
def test_rows_too_long_to_be_sorted(kind: Any, dtype: torch.dtype, epsilon: float) -> None:
    base, experts = inputs(kind, LONG, 1, dtype)
    experts[0][[5, 70_000, 70_001]] = torch.tensor([math.nan, math.inf, math.nan]).to(dtype)
    check(base, experts, density=0.5, rule="della", epsilon=epsilon)


@pytest.mark.any_isa
def test_long_rows_beside_one_another() -> None:
    base, experts = inputs(gaussian, (1, 310_000, 2), 1, torch.float32)
    check(base, experts, density=0.5, rule="della", epsilon=0.2)


@pytest.mark.parametrize("num_tasks", NUM_TASKS)
def test_every_number_of_experts(num_tasks: int) -> None:
    base, experts = inputs(gaussian, 257, num_tasks, torch.float32)
    check(base, experts, density=0.4)
    check(base, experts, density=0.4, rule="della", epsilon=0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("count", [32_767, 32_768, 32_769, 100_003])
def test_blocks_of_the_sums(count: int, dtype: torch.dtype) -> None:
    base, experts = inputs(rows, count, 2, dtype)
    check(base, experts, density=[0.5, 0.1])


def test_the_order_of_the_sums_is_that_of_gram() -> None:
    x = torch.randn(100_003, generator=generator("order"))
    assert gram(None, [x]).item() == reference.block_sum(x.double().square()).item()


def test_layouts() -> None:
    base, experts = inputs(gaussian, (31, 66), 3, torch.float32)
    moved = [x.t().contiguous().t() for x in (base, *experts)]
    apart = [torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape) for x in (base, *experts)]
    for options in RULES:
        bits, sums = masks(base, experts, density=DENSITY, **options)
        for of_layout in (moved, apart, [base, torch.stack(experts)]):
            given = of_layout[1:] if of_layout[1].dim() == 2 else of_layout[1]
            same = masks(of_layout[0], given, density=DENSITY, **options)
            assert torch.equal(same[0], bits)
            assert_same(same[1], sums)


@pytest.mark.parametrize("options", RULES, ids=option_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite(dtype: torch.dtype, options: dict[str, Any]) -> None:
    base, experts = inputs(grid, (20, 50), 3, dtype)
    experts[1][3, [5, 7, 9, 11]] = torch.tensor([math.nan, math.inf, -math.inf, math.nan]).to(dtype)
    for nonfinite in ("propagate", "drop"):
        check(base, experts, density=DENSITY, nonfinite=nonfinite, **options)
    message = r"^experts\[1\] must be finite, got 4 NaN or infinite values$"
    with pytest.raises(RuntimeError, match=message):
        masks(base, experts, density=DENSITY, nonfinite="error", **options)
    names = {"names": ["first", "second"], "nonfinite": "error"}
    with pytest.raises(RuntimeError, match=r"^experts\[0\] must be finite, got 4 .* in tensor 'second'$"):
        torch.ops.surgery_kernels.masks([], experts[:2], [0.5], **names)


def test_norms_that_overflow_are_no_error() -> None:
    experts = [torch.full((100,), 1e308, dtype=torch.float64)]
    assert masks(None, experts, density=1.0, nonfinite="error")[1].tolist() == [[100.0, math.inf, math.inf]]


@pytest.mark.parametrize("options", RULES, ids=option_id)
def test_several_tensors(options: dict[str, Any]) -> None:
    bases, experts, by_expert = [], [], [[], [], []]
    for shape, dtype in (
        ((5, 70), torch.float32),
        ((0,), torch.bfloat16),
        ((), torch.float16),
        ((40_000,), torch.float32),
    ):
        base, of_tensor = inputs(gaussian, shape, 3, dtype)
        bases.append(base)
        experts += of_tensor
        for t in range(3):
            by_expert[t].append(of_tensor[t])
    for ids in ({}, {"tensor_ids": [9, 2**32 - 1, 0, 5], "task_ids": [3, 0, 2**32 - 1]}):
        shared = {"density": DENSITY, "seed": -(2**63) + 5, **ids, **options}
        bits, sums = torch.ops.surgery_kernels.masks(bases, experts, **shared)
        kept, expected = reference.scope_masks(bases, by_expert, **shared)
        assert all(torch.equal(actual, pack(wanted)) for actual, wanted in zip(bits, kept, strict=True))
        assert_same(sums, expected)


# the known answers of the generator's authors, and the oracle's words for the counters that a tensor has
KNOWN = [
    ((0, 0, 0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((2**64 - 1, 2**32 - 1, 2**32 - 1, 2**64 - 1), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        (0x299F31D0A4093822, 0x13198A2E, 0x03707344, 0x85A308D3243F6A88),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("place", "words"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_words(place: tuple[int, int, int, int], words: list[int]) -> None:
    assert _C.philox_block(*place) == words


def test_the_definition_gives_the_words_of_the_oracle() -> None:
    for seed, tensor_id, task_id in ((0, 0, 0), (2**64 - 3, 7, 2**32 - 1), (12345, 2**32 - 1, 1)):
        words = [word for block in range(5) for word in _C.philox_block(seed, tensor_id, task_id, block)]
        assert reference.philox(seed, tensor_id, task_id, 19).tolist() == words[:19]


def test_seeds_of_either_sign_are_the_same_bits() -> None:
    x = [torch.ones(100)]
    assert torch.equal(masks(None, x, density=0.5, seed=-1)[0], masks(None, x, density=0.5, seed=2**64 - 1)[0])


def test_draws_of_other_places_differ() -> None:
    x = [torch.ones(4_000)] * 2
    drawn = [
        *masks(None, x, density=0.5)[0],
        *masks(None, x, density=0.5, seed=1)[0],
        *masks(None, x, density=0.5, seed=1 << 32)[0],
        *masks(None, x, density=0.5, tensor_id=1)[0],
        *masks(None, x, density=0.5, task_ids=[2, 3])[0],
    ]
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            agreeing = (unpack(first[None], (4_000,)) == unpack(second[None], (4_000,))).double().mean()
            assert abs(agreeing - 0.5) < 5 * 0.5 / math.sqrt(4_000)


@pytest.mark.parametrize("density", [1e-3, 0.3, 0.9])
def test_the_share_kept_is_the_density(density: float) -> None:
    kept = masks(None, [torch.ones(400_000)], density=density)[1][0, 0].item() / 400_000
    assert abs(kept - density) < 5 * math.sqrt(density * (1 - density) / 400_000)


def test_larger_magnitudes_are_kept_more_often() -> None:
    x = torch.arange(1.0, 1_001.0).repeat(400, 1)
    kept = unpack(masks(None, [x], density=0.5, rule="della", epsilon=0.4)[0], x.shape)[0].double().mean(dim=0)
    expected = 0.1 + 0.8 * torch.arange(1_000) / 999
    assert (kept - expected).abs().max() < 5 * 0.5 / math.sqrt(400)


def test_density_of_one_keeps_all_and_the_smallest_nothing() -> None:
    x = [torch.ones(21)]
    assert unpack(masks(None, x, density=1.0)[0], (21,)).all()
    assert unpack(masks(None, x, density=1.0, rule="della", epsilon=0.3)[0], (21,)).all()
    assert masks(None, x, density=2**-33)[1].tolist() == [[0.0, 21.0, 0.0]]


@given(shape=st.lists(st.integers(0, 9), max_size=4), num_tasks=st.integers(1, 5))
def test_bits_unpack_to_what_was_packed(shape: list[int], num_tasks: int) -> None:
    drawn = torch.rand(num_tasks, *shape, generator=generator(shape, num_tasks)) < 0.5
    bits = pack(drawn)
    assert bits.dtype == torch.uint8
    assert torch.equal(unpack(bits, shape), drawn)


def test_the_least_significant_bit_comes_first() -> None:
    drawn = torch.zeros(1, 11, dtype=torch.bool)
    drawn[0, [0, 3, 9]] = True
    assert pack(drawn).tolist() == [[0b1001, 0b10]]


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("density must be in (0, 1], got 0.0", {"density": 0.0}),
        ("rule must be one of 'random', 'della', got 'magnitude'", {"rule": "magnitude"}),
        ("nonfinite must be one of 'error', 'propagate', 'drop', got 'keep'", {"nonfinite": "keep"}),
        ("epsilon must be None with rule='random', got 0.1", {"epsilon": 0.1}),
        ("epsilon must be given with rule='della', got none", {"rule": "della"}),
        ("epsilon must be one number or one per expert (2), got 3", {"rule": "della", "epsilon": [0.1] * 3}),
        (
            "epsilon must keep density - epsilon and density + epsilon in (0, 1), got 0.5 with density 0.5",
            {"rule": "della", "epsilon": [0.1, 0.5]},
        ),
        (
            "epsilon must keep density - epsilon and density + epsilon in (0, 1), got -0.4 with density 0.3",
            {"rule": "della", "epsilon": -0.4, "density": 0.3},
        ),
        ("seed must be an integer, got 0.5", {"seed": 0.5}),
        ("seed must have 64 bits, got 18446744073709551616", {"seed": 2**64}),
        ("tensor_id must be an integer, got 'a'", {"tensor_id": "a"}),
        ("tensor_id must be in [0, 2**32), got 4294967296", {"tensor_id": 2**32}),
        ("task_ids must be in [0, 2**32), got -1", {"task_ids": [0, -1]}),
        ("task_ids must be one number for every expert (2), got 1", {"task_ids": [0]}),
        ("experts must be at least one tensor, got none", {"experts": []}),
    ],
    ids=str,
)
def test_refused(message: str, changes: dict[str, Any]) -> None:
    options = {"experts": [torch.zeros(10)] * 2, "density": 0.5, **changes}
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        masks(None, options.pop("experts"), **options)


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("masks must be a bool tensor [num_tasks, *shape], got torch.uint8 (3,)", lambda: pack(torch.zeros(3).byte())),
        ("masks must be a bool tensor [num_tasks, *shape], got list", lambda: pack([True])),
        ("bits must be uint8 [num_tasks, 2] for shape (9,), got torch.uint8 (1, 3)",
         lambda: unpack(torch.zeros(1, 3).byte(), (9,))),
        ("bits must be uint8 [num_tasks, 2] for shape (9,), got int", lambda: unpack(3, (9,))),
    ],
    ids=["dtype", "list", "length", "number"],
)  # fmt: skip
def test_what_is_no_mask(message: str, call: Callable[[], object]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.any_isa
@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("rule must be one of 'random', 'della', got 'x'", {"rule": "x"}),
        ("nonfinite must be one of 'error', 'propagate', 'drop', got 'x'", {"nonfinite": "x"}),
        ("epsilon must be given with rule='della', got none", {"rule": "della"}),
        ("epsilon must be one number per expert (2), got 1", {"rule": "della", "epsilon": [0.1]}),
        (
            "epsilon must keep density - epsilon and density + epsilon in (0, 1), got 0.6 with density 0.5",
            {"rule": "della", "epsilon": [0.1, 0.6]},
        ),
        ("tensor_ids must be one number for every merged tensor (1), got 2", {"tensor_ids": [0, 1]}),
        ("tensor_ids must be in [0, 2**32), got -1", {"tensor_ids": [-1]}),
        ("task_ids must be one number for every expert (2), got 3", {"task_ids": [0, 1, 2]}),
        ("task_ids must be in [0, 2**32), got 4294967296", {"task_ids": [0, 2**32]}),
    ],
    ids=str,
)
def test_what_the_op_refuses(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        torch.ops.surgery_kernels.masks([], [torch.zeros(10)] * 2, [0.5, 0.5], **changes)


@pytest.mark.any_isa
@pytest.mark.usefixtures("restored_isa", "restored_threads")
@pytest.mark.parametrize("options", RULES, ids=option_id)
def test_instruction_sets_and_threads(options: dict[str, Any]) -> None:
    for shape, dtype in (((70_001,), torch.bfloat16), ((300, 333), torch.float32), ((9, 50, 60), torch.float64)):
        base, experts = inputs(gaussian, shape, 3, dtype)
        results = []
        for isa in _C.isas():
            _C.set_isa(isa)
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                results.append(masks(base, experts, density=DENSITY, **options))
        for bits, sums in results[1:]:
            assert torch.equal(bits, results[0][0])
            assert torch.equal(sums, results[0][1])


@pytest.mark.any_isa
@pytest.mark.parametrize("options", RULES, ids=option_id)
def test_opcheck(options: dict[str, Any]) -> None:
    base, experts = inputs(gaussian, (7, 30), 3, torch.float32)
    other, of_other = inputs(gaussian, 20, 3, torch.bfloat16)
    given = {"seed": 3, "tensor_ids": [4, 1], "task_ids": [5, 6, 7], "names": ["a", "b"], **options}
    op = torch.ops.surgery_kernels.masks
    torch.library.opcheck(op, ([base, other], [*experts, *of_other], DENSITY), given)
    torch.library.opcheck(op, ([], experts, DENSITY), options)


@pytest.mark.any_isa
def test_compiled() -> None:
    def kept_share(base: Tensor, experts: list[Tensor]) -> Tensor:
        bits, sums = masks(base, experts, density=0.5, seed=2)
        return unpack(bits, base.shape).sum(dim=1) + sums[:, 1:2]

    torch.compiler.reset()
    base, experts = inputs(gaussian, (20, 33), 3, torch.float32)
    compiled = torch.compile(kept_share, fullgraph=True, backend="aot_eager")
    assert_same(compiled(base, experts), kept_share(base, experts))


@pytest.mark.any_isa
def test_fakes_have_the_shapes_and_dtypes_of_the_results() -> None:
    with torch.device("meta"):
        bits, sums = masks(torch.empty(7, 5).bfloat16(), torch.empty(4, 7, 5).bfloat16(), density=0.5)
    assert (tuple(bits.shape), bits.dtype, bits.device.type) == ((4, 5), torch.uint8, "meta")
    assert (tuple(sums.shape), sums.dtype, sums.device.type) == ((4, 3), torch.float64, "meta")
