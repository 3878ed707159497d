"""The CUDA kernels against the oracle, run on the CPU by csrc/emu: no GPU and no CUDA is needed."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels import reference
from surgery_kernels.ops import looks
from surgery_kernels.triton import _where_it_can
from tests import cuda_emulator
from tests.cases import (
    DTYPES,
    KINDS,
    SEMANTICS,
    SHAPES,
    assert_same,
    cancelling,
    densities_of,
    equal,
    gaussian,
    grid,
    inputs,
    leaning_down,
    leaning_up,
    merge_options,
    option_id,
    rising,
    rows,
    split_options,
    weights_of,
    with_weights,
)

pytestmark = pytest.mark.any_isa

OPS = ["trim_thresholds", "trim_limits", "ties_merge", "ties_split", "ties_merge_out"]
LARGE = 70_003  # past the size from which thresholds start with a sample
SCOPE = [(torch.bfloat16, (5_000,)), (torch.float32, ()), (torch.float32, (0,)), (torch.float16, (33, 31))]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = cuda_emulator.build(tmp_path_factory.mktemp("emulator"), "-O1")
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


@pytest.fixture
def ops(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Iterator[Any]:
    """The ops; with a seed, threads and blocks run in a random order."""
    library.sk_shuffle_threads(getattr(request, "param", 0))
    yield torch.ops.surgery_kernels_emulated
    library.sk_force_descent(False)


in_both_orders = pytest.mark.parametrize("ops", [0, 5], ids=["in order", "shuffled"], indirect=True)


def per_expert(options: dict[str, Any], num_tasks: int) -> dict[str, Any]:
    """Options of the public op as those of the schema."""
    listed = dict(options)
    for name in ("density", "weights"):
        if isinstance(listed.get(name), float):
            listed[name] = [listed[name]] * num_tasks
    return listed


def check(ops: Any, base: Tensor | None, experts: list[Tensor], what: str = "", **options: Any) -> None:
    options = {"density": 0.2, **options}
    expected = reference.ties_merge(base, experts, **options)
    assert_same(ops.ties_merge(base, experts, **per_expert(options, len(experts))), expected, f"{what} {options}")


def exact_l1_norms(kind: Any, dtype: torch.dtype) -> bool:
    """The oracle's L1 norms are exact; a float64 sum of float64 numbers is not."""
    return dtype != torch.float64 or kind in (grid, equal, cancelling)


@pytest.mark.parametrize("op", OPS)
def test_schemas_are_those_of_the_cpu(ops: Any, op: str) -> None:
    """Less what Triton alone takes, and with where they say whether there was NaN or infinity."""
    here, cpu = (getattr(namespace, op).default._schema for namespace in (ops, torch.ops.surgery_kernels))
    assert described(here.arguments[-1]) == ("found", "Optional[Tensor]", None, True, True)
    arguments = here.arguments[:-1]
    known = {argument.name for argument in arguments}
    assert [described(argument) for argument in arguments] == [described(a) for a in cpu.arguments if a.name in known]
    assert all(argument.has_default_value() for argument in cpu.arguments if argument.name not in known)
    assert [str(value.type) for value in here.returns] == [str(value.type) for value in cpu.returns]


def described(argument: Any) -> tuple[Any, ...]:
    return argument.name, str(argument.type), argument.default_value, argument.kwarg_only, argument.is_out


def test_what_is_rounded_once_is_left_to_triton(ops: Any) -> None:
    message = "semantics must be 'paper', 'mergekit' or 'peft' in the CUDA kernels, got 'exact'"
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        ops.ties_merge(None, [torch.ones(4)], [1.0], semantics="exact")


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_every_option(ops: Any, dtype: torch.dtype) -> None:
    for i, options in enumerate(merge_options()):
        kind = KINDS[i % len(KINDS)]
        if options.get("rescale") and not exact_l1_norms(kind, dtype):
            kind = grid
        base, experts = inputs(kind, 257, 3, dtype)
        check(ops, base, experts, kind.__name__, lam=-0.3, **with_weights(options, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_every_split_option(ops: Any, dtype: torch.dtype) -> None:
    for options in split_options():
        for kind in (grid, leaning_down):
            base, experts = inputs(kind, 300, 4, dtype)
            options = with_weights(options, 4)
            expected = reference.ties_split(base, experts, density=0.3, **options)
            assert_same(ops.ties_split(base, experts, [0.3] * 4, **options), expected, f"{kind.__name__} {options}")


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_every_shape(ops: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        base, experts = inputs(grid, shape, 3, dtype)
        for semantics in SEMANTICS:
            check(ops, base if semantics == "paper" else None, experts, str(shape), lam=0.3, semantics=semantics)


@in_both_orders
@pytest.mark.parametrize("num_tasks", [1, 2, 8, 20, 33])
def test_every_number_of_experts(ops: Any, num_tasks: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base, experts = inputs(gaussian, 333, num_tasks, dtype)
        check(ops, base, experts, density=densities_of(num_tasks), lam=0.3)
        check(ops, base, experts, density=densities_of(num_tasks), weights=weights_of(num_tasks), semantics="mergekit")


@in_both_orders
@pytest.mark.parametrize("descent", [False, True], ids=["bracket", "descent"])
@pytest.mark.parametrize("kind", [gaussian, grid, equal, rows, rising], ids=option_id)
def test_large(ops: Any, library: ctypes.CDLL, kind: Any, descent: bool) -> None:
    library.sk_force_descent(descent)
    for dtype, semantics in ((torch.float32, "mergekit"), (torch.bfloat16, "paper"), (torch.float16, "peft")):
        base, experts = inputs(kind, LARGE, 2, dtype)
        check(ops, base, experts, str(dtype), density=[0.1, 0.6], semantics=semantics)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_limits_keep_what_those_of_the_cpu_keep(ops: Any, dtype: torch.dtype) -> None:
    for kind in (gaussian, equal):
        base, experts = inputs(kind, 9_000, 3, dtype)
        for semantics in SEMANTICS:
            for density in ([0.2, 0.5, 1.0], [1e-9, 0.999, 0.3]):
                expected = reference.trim_thresholds(base, experts, density=density, semantics=semantics)
                assert_same(ops.trim_thresholds(base, experts, density, semantics), expected)
                thresholds, cuts = ops.trim_limits([base], experts, density, semantics)
                assert_same(thresholds, expected)
                _, cuts_of_cpu = torch.ops.surgery_kernels.trim_limits([base], experts, density, semantics)
                for expert, threshold, cut, of_cpu in zip(experts, thresholds, cuts, cuts_of_cpu, strict=True):
                    ties = ((expert - base).abs() == threshold).nonzero()
                    assert torch.equal(ties < cut, ties < of_cpu)  # where all ties stay, any cut behind them will do


@in_both_orders
def test_given_limits(ops: Any) -> None:
    base, experts = inputs(grid, 5_000, 3, torch.float32)
    for dtype in (torch.float32, torch.float64):
        check(ops, base, experts, thresholds=torch.tensor([0.0, 0.02, 0.05], dtype=dtype))
    arguments = [base], experts, [0.2] * 3
    thresholds, cuts = ops.trim_limits(*arguments, "mergekit")
    merged = torch.full_like(base, torch.nan)
    ops.ties_merge_out(*arguments, semantics="mergekit", thresholds=thresholds, cuts=cuts.tolist(), out=[merged])
    assert_same(merged, reference.ties_merge(base, experts, density=0.2, semantics="mergekit"))


@in_both_orders
def test_several_tensors_are_one_scope(ops: Any) -> None:
    for kind in (grid, leaning_down):
        pairs = [inputs(kind, shape, 3, dtype) for dtype, shape in SCOPE]
        bases, experts = [base for base, _ in pairs], [list(one) for one in zip(*(e for _, e in pairs), strict=True)]
        flat = [expert for _, of_tensor in pairs for expert in of_tensor]
        for semantics in SEMANTICS:
            out = [torch.full_like(base, torch.nan) for base in bases]
            ops.ties_merge_out(bases, flat, [0.4] * 3, 0.3, semantics=semantics, out=out)
            expected = reference.scope_merge(bases, experts, density=0.4, lam=0.3, semantics=semantics)
            for merged, tensor in zip(out, expected, strict=True):
                assert_same(merged, tensor, semantics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=option_id)
def test_every_layout(ops: Any, dtype: torch.dtype) -> None:
    """Strided and unaligned, inputs and outputs, with borders that nobody may touch."""
    base, experts = inputs(grid, (80, 101), 3, dtype)
    expected = reference.ties_merge(base, experts, density=0.2)
    for begin in (0, 1, 8):
        for step in (1, 2):
            wide = torch.full((5, 82, step * 110), torch.nan, dtype=dtype)
            views = wide[:, 1:81, begin : begin + step * 101 : step]
            for view, tensor in zip(views, (base, *experts), strict=False):
                view.copy_(tensor)
            before = wide.clone()
            ops.ties_merge_out([views[0]], list(views[1:4]), [0.2] * 3, out=[views[4]])
            assert_same(views[4].contiguous(), expected, f"{begin} {step}")
            views[4].fill_(torch.nan)
            assert_same(wide, before, f"{begin} {step}")


@in_both_orders
def test_draws_take_the_sign_of_the_scope(ops: Any) -> None:
    for kind in (cancelling, leaning_up, leaning_down):
        for dtype in DTYPES:
            base, experts = inputs(kind, 9_001, 2, dtype)
            for reduce in ("mean", "max"):
                check(ops, base, experts, kind.__name__, density=1.0, reduce=reduce)


def with_nonfinite(kind: Any, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    base, experts = inputs(kind, 5_000, 3, dtype)
    experts[1][[3, 4_097]] = torch.inf
    experts[1][4_999] = torch.nan
    experts[2][17] = -torch.inf
    return base, experts


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_nonfinite(ops: Any, dtype: torch.dtype) -> None:
    base, experts = with_nonfinite(grid, dtype)
    for nonfinite in ("propagate", "drop"):
        for semantics in SEMANTICS:
            for density in (1e-9, 0.4, 1.0):
                check(ops, base, experts, density=density, semantics=semantics, nonfinite=nonfinite)


def test_nonfinite_is_refused_in_the_words_of_the_cpu(ops: Any) -> None:
    base, experts = with_nonfinite(grid, torch.float32)
    big = torch.full((5_000,), -3e38)
    cases = [(base, experts), (experts[1], [base] * 3), (big, [base, -big, base]), (None, [base, base, experts[2]])]
    for first, others in cases:
        said = []
        for namespace in (torch.ops.surgery_kernels, ops):
            out = torch.full((5_000,), 7.0)
            bases = [] if first is None else [first, first]
            with pytest.raises(RuntimeError, match="must be finite, got") as raised:
                arguments = bases, [*others, *others], [0.2] * 3
                namespace.ties_merge_out(*arguments, names=["head", "tail"], out=[out, torch.zeros_like(out)])
            said.append(re.sub(r"\n.*", "", str(raised.value), flags=re.DOTALL))
            assert (out == 7).all()
        assert said[0] == said[1]
    for density in (0.2, 1.0):
        with pytest.raises(RuntimeError, match=r"experts\[1\] must be finite, got 3 NaN or infinite values"):
            ops.trim_thresholds(base, experts, [density] * 3)


def test_nonfinite_is_told_at_the_end_of_a_merge(ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But before outputs are delivered that are not contiguous."""
    base, experts = with_nonfinite(grid, torch.float32)
    waits: list[int] = []
    fetch = looks._fetch
    monkeypatch.setattr(looks, "_fetch", lambda found: [waits.append(len(found)), *fetch(found)][1:])
    merge = _where_it_can(ops.ties_merge_out, "ties_merge_out")
    message = r"^experts\[1\] must be finite, got 3 NaN or infinite values in tensor 'bad'$"
    with pytest.raises(RuntimeError, match=message), looks.put_off():
        for name, others in (("fine", [base] * 3), ("bad", experts)):
            out = torch.full((5_000,), 7.0)
            merge([base], others, [0.2] * 3, names=[name], out=[out])
        assert waits == []
    assert waits == [2]
    assert (out == 7).all()
    strided = torch.full((10_000,), 7.0)
    with looks.put_off(), pytest.raises(RuntimeError, match=message.replace("$", "")):
        merge([base], experts, [0.2] * 3, names=["bad"], out=[strided[::2]])
    assert (strided == 7).all()
    for op, given in (
        ("ties_merge", (base, experts)),
        ("trim_limits", ([base], experts)),
        ("ties_split", (base, experts)),
    ):
        with pytest.raises(RuntimeError, match=r"^experts\[1\] must be finite, got 3 NaN or infinite values$"):
            _where_it_can(getattr(ops, op), op)(*given, [0.2] * 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"thresholds": torch.tensor([0.1, -0.5])}, "thresholds must be 0 or greater, got -0.5"),
        ({"thresholds": torch.tensor([0.1])}, "thresholds must be one value per expert, got 1"),
        ({"thresholds": torch.tensor([1, 2])}, "thresholds must be float64, float32, float16 or bfloat16"),
        ({"thresholds": torch.ones(2).half()}, "thresholds must be float32 or float64, got another dtype"),
        ({"lam": 1e39}, "lam must be finite in the compute type, got 1e+39"),
        ({"elect": "none"}, "elect must be 'sum' or 'count' with semantics='paper', got 'none'"),
    ],
    ids=lambda value: value.split(",")[0] if isinstance(value, str) else None,
)
def test_errors(ops: Any, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}"):
        ops.ties_merge(None, [torch.ones(3)] * 2, [0.5] * 2, **arguments)


def test_errors_of_tensors(ops: Any) -> None:
    ones, twos = torch.ones(3), torch.full((3,), 2.0)
    out = [torch.empty(3)]
    for arguments, sentence in [
        (
            ([ones], [ones, twos, twos], [0.5] * 2),
            "experts must be one tensor for every expert and merged tensor, got 3",
        ),
        (([ones], [], [0.5] * 2), "experts must be at least one tensor, got none"),
        (([ones, ones], [ones, twos], [0.5] * 2), "base must be one tensor for every merged tensor, got 2 for 1"),
        (([ones], [ones, twos.double()], [0.5] * 2), "experts[1] must have the dtype of experts[0], got another"),
        (([ones[:2]], [ones, twos], [0.5] * 2), "base must have the shape of experts[0], got another"),
        (([], [torch.ones(3)] * 1025, [0.5] * 1025), "experts must be at most 1024 on CUDA, got 1025"),
    ]:
        with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}"):
            ops.ties_merge_out(*arguments, out=out)
    with pytest.raises(RuntimeError, match="^out must be apart from every other out, got memory that overlaps one"):
        ops.ties_merge_out([ones] * 2, [ones, twos] * 2, [0.5] * 2, out=out * 2)
    for outs, sentence in [
        ([out[0], torch.empty(3)], "out must be one tensor for every merged tensor, got 2"),
        ([ones], "out must be apart from every input, got memory that overlaps one"),
        ([torch.empty(4)], "out must have the shape of experts[0], got another"),
    ]:
        with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}"):
            ops.ties_merge_out([ones], [ones, twos], [0.5] * 2, out=outs)
    mixed = [torch.ones(3), torch.ones(3).double()]
    with pytest.raises(RuntimeError, match="^experts must be all float64 or none within one scope, got both"):
        ops.ties_merge_out([], mixed, [0.5], out=[torch.empty(3), torch.empty(3).double()])
    with pytest.raises(RuntimeError, match="^thresholds must be given where cuts are, got none"):
        ops.ties_merge_out([], [ones], [0.5], cuts=[3], out=out)
    with pytest.raises(RuntimeError, match="^cuts must be one per expert, got 2"):
        ops.ties_merge_out([], [ones], [0.5], thresholds=torch.ones(1), cuts=[3, 3], out=out)


def test_the_emulator_notices_missing_barriers(tmp_path: Path) -> None:
    program = tmp_path / "emulator"
    sources = [str(cuda_emulator.ROOT / path) for path in ("tests/emulator.cpp", "csrc/emu/machine.cpp")]
    include = ["-Icsrc", "-isystem", str(cuda_emulator.TORCH / "include")]
    cuda_emulator.run([*cuda_emulator.compiler(), "-std=c++17", *include, *sources, "-o", str(program)])
    assert cuda_emulator.run([str(program)]).splitlines() == [
        "sum with barriers: 32640 32640",
        "sum without: differs",
        "a thread that never comes: every thread of a block must reach the same barrier, some never do",
    ]


def test_with_sanitizers(tmp_path: Path) -> None:
    """No access outside of any tensor or table, no misaligned pack, no undefined arithmetic."""
    flags = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    runtimes = [
        cuda_emulator.run([*cuda_emulator.compiler(), f"-print-file-name=lib{name}.so"]).strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("the compiler has no shared sanitizers")
    library = cuda_emulator.build(tmp_path, *flags)
    said = cuda_emulator.run(
        [sys.executable, "-m", "tests.cuda_emulator", str(library)],  # as a file it would find tests/inspect first
        LD_PRELOAD=" ".join(runtimes),
        ASAN_OPTIONS="detect_leaks=0",
        PYTHONPATH=str(cuda_emulator.ROOT),
    )
    assert "fine" in said.splitlines()
