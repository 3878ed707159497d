"""surgery_train's Triton kernels against the oracle: on a GPU, or in the interpreter; and `fit` on a GPU."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import reference, surgery_train
from surgery_kernels.surgery import attach, fit
from tests import train_cases
from tests.borders import in_poisoned_memory, is_intact
from tests.cases import DTYPES, bits, generator, option_id
from tests.train_cases import Problem, trained

kernels = pytest.importorskip("surgery_kernels.triton.surgery_train", reason="there is no Triton for this platform")
pytestmark = pytest.mark.any_isa
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OPS = torch.ops.surgery_kernels


def problem(**options: Any) -> Problem:
    """A smaller one: the interpreter is slow."""
    return train_cases.problem(**{"num_tasks": 2, "steps": 3, **options})


def trained_on(
    gpu: torch.device, given: Problem, betas: tuple[float, float] = (0.9, 0.999), **options: Any
) -> list[Tensor]:
    """What `trained` gives, of the kernels: back on the CPU, from memory with poisoned borders."""
    copy = given.map(lambda x: in_poisoned_memory(x.to(gpu)))
    losses = kernels.surgery_train(*copy, beta1=betas[0], beta2=betas[1], **options)
    assert all(is_intact(x) for x in copy.moved)
    return [x.cpu() for x in (losses, *copy.moved)]


class Launches:
    """A kernel that tells how it is launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.grids: list[tuple[int, ...]] = []
        self.cooperative: list[bool] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.grids.append(grid)
            self.cooperative.append(options["launch_cooperative_grid"])
            return self.kernel[grid](*arguments, **options)

        return launch


def assert_close_to_reference(gpu: torch.device, given: Problem, **options: Any) -> None:
    train_cases.assert_close_to_reference(trained_on(gpu, given, **options), given, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
@pytest.mark.parametrize("dim", [1, 33, 64, 257])
def test_every_dim_and_rank(gpu: torch.device, dim: int, dtype: torch.dtype) -> None:
    for rank in {33: (1, 3, 16, 33)}.get(dim, (5,)):
        assert_close_to_reference(gpu, problem(dim=dim, rank=rank, steps=2, dtype=dtype))


@pytest.mark.parametrize("batch", [1, 7, 65])
def test_batches(gpu: torch.device, batch: int) -> None:
    """More images than there are, too: a batch may name one several times."""
    assert_close_to_reference(gpu, problem(batch=batch, started=True), step=10)


@pytest.mark.parametrize("dtype", DTYPES, ids=option_id)
def test_more_than_registers_hold(gpu: torch.device, dtype: torch.dtype) -> None:
    """Then the steps are made of other ops."""
    assert all(128 not in tiles[64] for tiles in kernels.TILES.values())
    assert_close_to_reference(gpu, problem(rank=40, batch=70, steps=2, dtype=dtype), zero_grad_steps=1, lr=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.05},
        {"betas": (0.5, 0.9)},
        {"betas": (0.0, 0.0)},
        {"eps": 1e-3},
        {"zero_grad_steps": 7},
        {"step": 40, "zero_grad_steps": 3, "lr": 3e-3},
    ],
    ids=str,
)
def test_options(gpu: torch.device, options: dict[str, Any]) -> None:
    given = problem(dtype=torch.float64, started="step" in options)
    assert_close_to_reference(gpu, given, **options)


def test_the_loss_falls(gpu: torch.device) -> None:
    losses = trained_on(gpu, problem(steps=60, dim=32, rank=16), lr=2e-2)[0]
    assert (losses[-10:].mean(dim=0) < 0.9 * losses[:10].mean(dim=0)).all()


@pytest.mark.parametrize(("dim", "slices"), [(16, 1), (17, 2), (200, 8)])
def test_slices_of_a_task(dim: int, slices: int, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that meet, each with its columns of dim, or with several tiles of them; some tasks at once."""
    launches = Launches(kernels.train_kernel)
    monkeypatch.setattr(kernels, "train_kernel", launches)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 2 * slices)
    given = problem(num_tasks=3, dim=dim, rank=40, started=True)
    assert kernels.TILES[torch.float32][64][16][0] == 16
    assert_close_to_reference(gpu, given, step=10, zero_grad_steps=1)
    assert launches.grids == [(2, slices), (1, slices)]
    assert launches.cooperative == [slices > 1] * 2


def test_a_task_that_is_not_aligned_is_read_by_itself(gpu: torch.device) -> None:
    given = problem(dim=64).map(lambda x: x.to(gpu))
    moved = given.clone()
    features = [
        given.features[0],
        torch.empty(given.features[1].numel() + 1, device=gpu)[1:].view_as(given.features[1]),
    ]
    features[1].copy_(given.features[1])
    assert features[1].data_ptr() % 16 and not features[0].data_ptr() % 16
    table, _ = kernels._tables(features, given.targets, 1, 0, 1e-3, (0.9, 0.999), 1e-8, 0)
    assert table[:, 3].tolist() == [1, 0]
    losses = [kernels.surgery_train(x, given.targets, *copy[2:]) for x, copy in
              ((given.features, given.clone()), (features, moved))]  # fmt: skip
    if gpu.type == "cpu":  # the sums of a GPU are in the order of its layouts
        assert torch.equal(*losses)
    torch.testing.assert_close(*losses)


def test_cut_into_calls(gpu: torch.device) -> None:
    given = problem(steps=8)
    whole = trained_on(gpu, given, zero_grad_steps=2)
    copy, losses, step = given.clone().map(lambda x: x.to(gpu)), [], 0
    for part in copy.indices.split([1, 3, 0, 4]):
        losses.append(kernels.surgery_train(*copy[:6], part, step=step, zero_grad_steps=2))
        step += len(part) * 3
    for x, y in zip([torch.cat(losses), *copy.moved], whole, strict=True):
        assert torch.equal(bits(x.cpu()), bits(y))


def test_tasks_do_not_touch_each_other(gpu: torch.device) -> None:
    given = problem(num_tasks=3)
    together = trained_on(gpu, given)
    for t in range(3):
        parameters = [given.down[t : t + 1], given.up[t : t + 1]]
        moments = [given.down_moments[:, t : t + 1], given.up_moments[:, t : t + 1]]
        alone = Problem(
            given.features[t : t + 1],
            given.targets[t : t + 1],
            *parameters,
            *(x.contiguous() for x in moments),
            given.indices[:, t : t + 1],
        )
        losses, down, up, *_ = trained_on(gpu, alone)
        assert torch.equal(losses[:, 0], together[0][:, t])
        assert torch.equal(down[0], together[1][t])
        assert torch.equal(up[0], together[2][t])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nonfinite_image_reaches_its_task_from_the_step_that_takes_it(gpu: torch.device, value: float) -> None:
    given = problem(steps=6)
    given = given._replace(indices=given.indices.clamp(min=1))
    features = [x.clone() for x in given.features]
    features[1][0, 32] = value
    indices = given.indices.clone()
    indices[3, 1, 2] = 0
    spoilt = trained_on(gpu, given._replace(features=features, indices=indices))
    healthy = trained_on(gpu, given)
    assert torch.equal(spoilt[0][:, 0], healthy[0][:, 0])
    assert torch.equal(spoilt[0][:3, 1], healthy[0][:3, 1])
    assert not spoilt[0][3:, 1].isfinite().any()
    assert torch.equal(spoilt[1][0], healthy[1][0])
    assert torch.equal(spoilt[2][0], healthy[2][0])
    assert spoilt[1][1].isnan().any()


def test_where_nothing_is_wrong_nothing_moves(gpu: torch.device) -> None:
    given = problem()
    losses, down, up, *moments = trained_on(gpu, given._replace(targets=given.features))
    assert losses.count_nonzero() == 0
    assert torch.equal(down, given.down)
    assert torch.equal(up, given.up)
    assert all(x.count_nonzero() == 0 for x in moments)


@pytest.mark.parametrize("shape", [{"rank": 0}, {"dim": 0}, {"steps": 0}], ids=str)
def test_empty(gpu: torch.device, shape: dict[str, int]) -> None:
    given = problem(**shape)
    for x, y in zip(trained_on(gpu, given), trained(reference.surgery_train, given), strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


def test_layouts(gpu: torch.device) -> None:
    """Features, targets and indices of any strides and alignment."""
    given = problem(dim=32)
    expected = trained_on(gpu, given)
    moved = given._replace(
        features=[x.t().contiguous().t() for x in given.features],
        targets=[torch.cat([x.new_zeros(1), x.view(-1)])[1:].view(x.shape) for x in given.targets],
        indices=given.indices.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    )
    for x, y in zip(trained_on(gpu, moved), expected, strict=True):
        assert torch.equal(x, y)
    copy = moved.clone().map(lambda x: x.to(gpu))
    for x, y in zip([kernels.surgery_train(*copy), *copy.moved], expected, strict=True):
        assert torch.equal(x.cpu(), y)


def test_while_a_graph_is_captured_images_that_are_not_there_are_nan(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "is_capturing", lambda device: True)
    for given, image in ((problem(), -1), (problem(), 2**40), (problem(rank=40, batch=70), 40)):
        healthy = trained_on(gpu, given)
        indices = given.indices.clone()
        indices[1, 0, 3] = image
        losses, down, *_ = trained_on(gpu, given._replace(indices=indices))
        assert losses[1:, 0].isnan().all()
        assert torch.equal(losses[:, 1], healthy[0][:, 1])
        assert torch.equal(losses[0], healthy[0][0])
        assert torch.equal(down[1], healthy[1][1])


def test_refused_before_anything_moves(gpu: torch.device) -> None:
    given = problem(dim=5, rank=4, batch=6, images=7).map(lambda x: x.to(gpu))  # images: 7 and 10
    refused: list[tuple[Problem, str]] = []
    for t, image, count in ((0, 7, 7), (1, -3, 10)):
        indices = given.indices.clone()
        indices[2, t, 1] = image
        refused.append((given._replace(indices=indices), f"indices must be in [0, {count}) for task {t}, got {image}"))
    another = "must be contiguous {} in the dtype of down, got another tensor"
    refused += [
        (given._replace(up=given.up[:1]), f"up {another.format((2, 5, 4))}"),
        (given._replace(up=given.up.double()), f"up {another.format((2, 5, 4))}"),
        (
            given._replace(down_moments=given.down_moments.mT.contiguous().mT),
            f"down_moments {another.format((2, 2, 4, 5))}",
        ),
        (
            given._replace(features=given.features[:1]),
            "features and targets must be one tensor per task, 2, got another number",
        ),
        (
            given._replace(targets=[given.targets[0], given.targets[0]]),
            "features[1] and targets[1] must be [images, 5] of one dtype, got another tensor",
        ),
        (given._replace(indices=given.indices.int()), "indices must be int64 [steps, 2, batch], got another tensor"),
        (
            given._replace(targets=[given.down.view(-1)[:35].view(7, 5), given.targets[1]]),
            "down must be apart from every other tensor, got memory that overlaps one",
        ),
    ]
    before = given.clone()
    for wrong, message in refused:
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            kernels.surgery_train(*wrong)
    for x, y in zip(given.moved, before.moved, strict=True):
        assert torch.equal(x, y)


def cuda(given: Problem) -> Problem:
    return given.map(lambda x: x.cuda())


@needs_gpu
def test_opcheck() -> None:
    given = cuda(problem(steps=2))
    torch.library.opcheck(OPS.surgery_train, tuple(given), {"step": 3, "lr": 0.01, "zero_grad_steps": 1})


@needs_gpu
def test_compiled() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda given: surgery_train(*given, lr=0.01) * 2, fullgraph=True)
    given = cuda(problem())
    first, second = given.clone(), given.clone()
    assert torch.equal(compiled(first), surgery_train(*second, lr=0.01) * 2)
    for x, y in zip(first.moved, second.moved, strict=True):
        assert torch.equal(x, y)


@needs_gpu
@pytest.mark.parametrize("batch", [16, 256], ids=["one-launch", "by-ops"])
def test_cuda_graph(batch: int) -> None:
    given = cuda(problem(rank=32, batch=batch))
    expected = trained(surgery_train, given)
    copy = given.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = surgery_train(*copy)
    for x, y in zip(copy.moved, given.moved, strict=True):
        x.copy_(y)
    graph.replay()
    for x, y in zip([losses, *copy.moved], expected, strict=True):
        assert torch.equal(x, y)


@needs_gpu
def test_side_stream() -> None:
    given = cuda(problem())
    expected = trained(surgery_train, given)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        actual = trained(surgery_train, given)
    side.synchronize()
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y)


class Encoder(nn.Module):
    """Three blocks over tokens, and the first token projected."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.GELU()) for _ in range(3)))
        self.project = nn.Linear(24, 16)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)) / 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.project(self.blocks(tokens)[:, 0])


@needs_gpu
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_fit(mode: str, autocast: torch.dtype | None) -> None:
    """On a GPU as on the CPU, but for rounding that Adam makes large; and the adapters serve a model there."""
    tasks = {"a": 1, "b": 2}
    samples = {task: torch.randn(40, 9, 24, generator=generator(seed)) for task, seed in tasks.items()}
    fitted = []
    for device in ("cpu", "cuda"):
        experts = {task: Encoder(seed).to(device) for task, seed in tasks.items()}
        merged = Encoder(3).to(device)
        fitted.append(fit(merged, experts, samples, mode, rank=4, steps=60, lr=1e-2, autocast=autocast))
    on_cpu, on_gpu = fitted
    assert all(x.device.type == "cuda" and x.dtype == torch.float32 for x in on_gpu.adapters.parameters())
    assert on_gpu.log.bias.device.type == "cpu"
    early, late = (x.mean(dim=0).sum(dim=-1) for x in (on_gpu.log.bias[:5], on_gpu.log.bias[-5:]))
    assert (late < 0.95 * early).all()
    tolerance = 0.02 if autocast is None else 0.1
    torch.testing.assert_close(on_gpu.log.bias, on_cpu.log.bias, rtol=tolerance, atol=tolerance)
    with attach(merged, on_gpu.adapters) as model:
        for task in ("a", ["a", "b"] * 20):
            assert model(samples["a"].cuda(), task=task).isfinite().all()


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
