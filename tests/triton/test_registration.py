"""CUDA tensors reach the Triton kernels through the ops: gradients, models; on a GPU torch.compile, graphs, streams.

Without a GPU the ops take the Triton kernels for CPU tensors while a test of `device` lasts.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery_kernels as sk
from surgery_kernels import merge_state_dicts
from surgery_kernels.triton import MODULES, host_function
from tests.cases import assert_same, densities_of, gaussian, grid, inputs, weights_of
from tests.conftest import merging_ops
from tests.guards import Counted
from tests.programs import scaled_distance

pytestmark = pytest.mark.any_isa

OPS = merging_ops()

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
_ops = torch.ops.surgery_kernels


def test_every_op_has_an_implementation() -> None:
    names = {name.removeprefix("surgery_kernels::") for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("surgery_kernels::")}  # fmt: skip
    assert set(MODULES) == names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"surgery_kernels::{name}", "CUDA")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("op", OPS)
def test_host_functions_have_the_signature_of_the_schema(op: str) -> None:
    parameters = inspect.signature(host_function(op)).parameters.values()
    schema = getattr(_ops, op).default._schema.arguments
    assert [p.name for p in parameters] == [argument.name for argument in schema]
    for parameter, argument in zip(parameters, schema, strict=True):
        assert (parameter.kind == parameter.KEYWORD_ONLY) == argument.kwarg_only
        wanted = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        assert parameter.default == wanted, parameter.name


def test_ops_that_may_raise_for_numbers_end_a_cuda_graph_of_torch_compile() -> None:
    for name in MODULES:
        op = getattr(_ops, name).default
        looks = any(argument.name == "nonfinite" for argument in op._schema.arguments)
        assert (torch.Tag.cudagraph_unsafe in op.tags) == looks, name


def test_importing_the_package_does_not_import_triton(run_python: Callable[..., str]) -> None:
    there = "print('triton' in sys.modules)"
    before, after = run_python("-c", f"import sys, torch\n{there}\nimport surgery_kernels\n{there}").split()
    assert before == after


def test_without_triton_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    host_function.cache_clear()
    with pytest.raises(ImportError, match=r"^triton must be installed for CUDA tensors, got none: pip install triton$"):
        host_function("combine")
    host_function.cache_clear()


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


@needs_gpu
@pytest.mark.parametrize("semantics", ["paper", "mergekit", "peft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tensors_have_the_bits_of_the_cpu(dtype: torch.dtype, semantics: str) -> None:
    base, experts = inputs(gaussian, 3_000_001, 8, dtype)
    options: dict[str, Any] = {"density": densities_of(8), "lam": 0.3, "semantics": semantics}
    moved = on_gpu(base, *experts)
    assert_same(sk.ties_merge(moved[0], moved[1:], **options).cpu(), sk.ties_merge(base, experts, **options))
    del options["lam"]
    assert_same(sk.ties_split(moved[0], moved[1:], **options).cpu(), sk.ties_split(base, experts, **options))
    expected = sk.trim_thresholds(base, experts, density=0.2, semantics=semantics)
    assert_same(sk.trim_thresholds(moved[0], moved[1:], density=0.2, semantics=semantics).cpu(), expected)


@needs_gpu
def test_trim_on_data_that_misleads_a_sample() -> None:
    base = torch.zeros(1 << 20)
    experts = [torch.zeros(1 << 20) for _ in range(3)]
    experts[0][:200_000] = torch.randn(200_000)
    experts[1][::2] = 1.0
    experts[2][-100:] = torch.arange(100.0)
    moved = on_gpu(base, *experts)
    for density in (0.15, 0.19, 0.5, 1e-4):
        expected = sk.trim_thresholds(base, experts, density=density)
        assert_same(sk.trim_thresholds(moved[0], moved[1:], density=density).cpu(), expected)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 20 << 30,
    reason="needs a GPU with 20 GiB",
)
def test_more_elements_than_32_bits_count() -> None:
    size = (1 << 31) + 1_000
    expert = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    expert[-64:] = torch.arange(1, 65, dtype=torch.bfloat16)
    density = 31.5 / size  # keeps 32
    assert sk.trim_thresholds(None, [expert], density=density).item() == 33
    for semantics in ("paper", "mergekit"):
        merged = sk.ties_merge(None, [expert], density=density, semantics=semantics)
        assert merged.count_nonzero() == (32 if semantics == "paper" else 31)
        assert_same(merged[-31:], expert[-31:])


def test_combine_has_a_gradient(device: torch.device) -> None:
    base, *task_vectors = (torch.randn(50, dtype=torch.float64, device=device) for _ in range(4))
    coefficients = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    block_offsets = torch.tensor([0, 20, 50], device=device)
    torch.autograd.gradcheck(lambda c: sk.combine(base, task_vectors, c, block_offsets), coefficients)
    torch.autograd.gradgradcheck(lambda c: sk.combine(base, task_vectors, c, block_offsets), coefficients)


def test_opcheck(device: torch.device) -> None:
    base, experts = inputs(gaussian, 100, 2, torch.float32)
    base, *experts = (x.to(device) for x in (base, *experts))
    out = [torch.zeros_like(base)]
    torch.library.opcheck(_ops.trim_thresholds, (base, experts, [0.2] * 2))
    torch.library.opcheck(_ops.trim_limits, ([base], experts, [0.2] * 2))
    torch.library.opcheck(_ops.gram, ([base], experts, 2, "row"))
    torch.library.opcheck(_ops.gram_cross, (torch.stack(experts)[..., None].mT, torch.stack(experts)[..., None].mT))
    torch.library.opcheck(_ops.ties_merge, (base, experts, [0.2] * 2))
    torch.library.opcheck(_ops.ties_split, (base, experts, [0.2] * 2))
    torch.library.opcheck(_ops.ties_merge_out, ([base], experts, [0.2] * 2), {"out": out})
    torch.library.opcheck(
        _ops.mix_out, ([base], experts, torch.full((1, 2, 1), 0.3, dtype=torch.float64)), {"out": out}
    )
    torch.library.opcheck(
        _ops.weighted_merge_out, ([base], experts, [x.abs() for x in experts], [1.0, 2.0]), {"out": out}
    )
    clipping = torch.tensor([[0.0, 1.0, 1.0]] * 2, dtype=torch.float64)
    torch.library.opcheck(_ops.weighted_merge_scored_out, ([base], experts, clipping, clipping), {"out": out})
    torch.library.opcheck(_ops.weighted_merge_limits, ([base], experts, clipping, [3, 2]))
    steps = scaled_distance()
    numbers = steps.table([0.3])
    torch.library.opcheck(_ops.steps_out, (experts, 2, steps.program, numbers), {"out": out})
    torch.library.opcheck(_ops.steps_limits, (experts, 2, steps.program, numbers, [3, -2]))
    coefficients = torch.rand(2, 1, device=device, requires_grad=True)
    torch.library.opcheck(_ops.combine, (base, experts, coefficients, torch.tensor([0, 100], device=device)))


def test_compiled_whole(device: torch.device) -> None:
    base, experts = inputs(gaussian, 500, 3, torch.bfloat16)
    base, *experts = (x.to(device) for x in (base, *experts))
    block_offsets = torch.tensor([0, 100, 500], device=device)

    def merge(coefficients: Tensor) -> Tensor:
        split = sk.ties_split(base, experts, density=0.2)
        return sk.combine(base, list(split), coefficients, block_offsets) + sk.ties_merge(base, experts)

    coefficients = torch.rand(3, 2, device=device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    assert_same(torch.compile(merge, fullgraph=True, backend=backend)(coefficients), merge(coefficients))


@needs_gpu
def test_captured_in_a_graph() -> None:
    base, experts = inputs(gaussian, 200_000, 4, torch.float32)
    base, *experts = on_gpu(base, *experts)
    out = [torch.full_like(base, math.nan) for _ in range(3)]
    task_vectors, coefficients = list(torch.randn(2, len(base), device="cuda")), torch.rand(2, 1, device="cuda")
    block_offsets = torch.tensor([0, len(base)], device="cuda")

    def work() -> None:
        for x, semantics in zip(out, ("paper", "mergekit"), strict=False):
            options = {"semantics": semantics, "nonfinite": "propagate"}
            _ops.ties_merge_out([base], experts, [0.2] * 4, **options, out=[x])
        out[2].copy_(_ops.combine(base, task_vectors, coefficients, block_offsets))

    work()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for expert in experts:
        expert.add_(torch.randn_like(expert))
    graph.replay()
    replayed = [x.clone() for x in out]
    work()
    for x, expected in zip(replayed, out, strict=True):
        assert_same(x, expected)
    message = r"^nonfinite must be 'propagate' or 'drop' while a CUDA graph is captured, got 'error'$"
    with pytest.raises(ValueError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sk.ties_merge(base, experts)


@needs_gpu
def test_on_a_stream_of_its_own() -> None:
    base, experts = inputs(gaussian, 1_000_000, 4, torch.bfloat16)
    expected = sk.ties_merge(base, experts)
    moved = on_gpu(base, *experts)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        delayed = [x + 0 for x in moved]
        merged = sk.ties_merge(delayed[0], delayed[1:], nonfinite="propagate")
    stream.synchronize()
    assert_same(merged.cpu(), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_another_device_than_the_current() -> None:
    base, experts = inputs(gaussian, 10_000, 3, torch.float32)
    moved = [x.to("cuda:1") for x in (base, *experts)]
    with torch.cuda.device(0):
        merged = sk.ties_merge(moved[0], moved[1:])
    assert merged.device == torch.device("cuda:1")
    assert_same(merged.cpu(), sk.ties_merge(base, experts))


def models(device: torch.device | str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    sizes = {"a": (64, 33), "b": (70,), "c": (), "d": (300, 17)}
    base: dict[str, Tensor] = {}
    experts: list[dict[str, Tensor]] = [{}, {}, {}]
    for i, (name, shape) in enumerate(sizes.items()):
        tensor, of_tensor = inputs(grid, shape, 3, (torch.float32, torch.bfloat16)[i % 2])
        base[name] = tensor.to(device)
        for expert, x in zip(experts, of_tensor, strict=True):
            expert[name] = x.to(device)
    for model in (base, *experts):
        model["tied"], model["steps"] = model["a"], torch.tensor(7, device=device)
    return base, experts


STATE_DICTS: list[dict[str, Any]] = [
    {"density": 0.3, "lam": 0.3},
    {"semantics": "mergekit", "weights": weights_of(3), "rescale": True},
    {"semantics": "peft", "scope": "tensor"},
    {"method": "average", "weights": [1.0, 2.0, 0.5]},
    {"method": "task_arithmetic", "lam": 0.3},
    {"method": "pcb", "density": 0.2},
]


@pytest.fixture(scope="module")
def merged_on_the_cpu() -> list[dict[str, Tensor]]:
    return [merge_state_dicts(*models("cpu"), **options) for options in STATE_DICTS]


@pytest.mark.parametrize("place", range(len(STATE_DICTS)))
def test_state_dicts(place: int, merged_on_the_cpu: list[dict[str, Tensor]], device: torch.device) -> None:
    merged = merge_state_dicts(*models(device), **STATE_DICTS[place])
    assert merged["tied"].data_ptr() == merged["a"].data_ptr()
    for name, tensor in merged_on_the_cpu[place].items():
        assert merged[name].device.type == device.type
        assert_same(merged[name].cpu(), tensor, name)


@needs_gpu
def test_tensors_that_decide_nothing_together_take_the_same_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery_kernels.triton import mix

    kernel = Counted(mix._mix)
    monkeypatch.setattr(mix, "_mix", kernel)
    merge_state_dicts(*models("cuda"), method="average")
    assert kernel.launches == 2  # float32 and bfloat16


ADAMERGING: dict[str, Any] = {
    "method": "adamerging",
    "objective": lambda tensors, step: sum((tensor.double() ** 2).sum() for tensor in tensors.values()),
    "steps": 2,
    "density": 0.3,
}


@pytest.fixture(scope="module")
def adamerged_on_the_cpu() -> dict[str, Tensor]:
    return merge_state_dicts(*models("cpu"), **ADAMERGING)


def test_adamerging_of_state_dicts(adamerged_on_the_cpu: dict[str, Tensor], device: torch.device) -> None:
    merged = merge_state_dicts(*models(device), **ADAMERGING)
    for name, tensor in adamerged_on_the_cpu.items():
        torch.testing.assert_close(merged[name].cpu(), tensor)
