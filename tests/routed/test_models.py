"""What all routed models have in common."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels.routed import RoutedModel, Smile, TwinMerging, WEMoE, smile, twin_merging, wemoe
from tests.encoders import BATCH, Case, clip, made, open_clip, open_clip_token_major, perturbed, timm, vit

pytestmark = pytest.mark.any_isa

Build = Callable[..., RoutedModel]


def twin(base: nn.Module, experts: dict[str, Any], **options: Any) -> TwinMerging:
    """With a router that nobody trained: it gives every sample weights of its own."""
    model = twin_merging(base, experts, rank=4, **options)
    with torch.no_grad():
        width = model.features(torch.randn(2, 3, 8, 8, dtype=next(base.parameters()).dtype)).shape[1]
    torch.manual_seed(1)
    model.put_router(width, 5).eval()
    return model


def low_rank(base: nn.Module, experts: dict[str, Any]) -> Smile:
    return smile(base, experts, rank=4)


def two_of_them(base: nn.Module, experts: dict[str, Any]) -> Smile:
    return smile(base, experts, rank=4, gate_rank=2, top_k=2)


def apart(base: nn.Module, experts: dict[str, Any]) -> WEMoE:
    """With routers that give every sample weights of its own."""
    model = wemoe(base, experts)
    for parameter in (p for router in model.routers for p in router.parameters()):
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


BUILDS: list[Build] = [apart, low_rank, two_of_them, twin]


def case_of(case: Callable[[], Case] = timm, num_experts: int = 3) -> tuple[Case, dict[str, nn.Module]]:
    one = made(case)
    return one, {f"task{t}": perturbed(one.model, t) for t in range(num_experts)}


@torch.no_grad()
def features(case: Case, model: nn.Module, inputs: Any = None) -> Tensor:
    return case.representation(model(case.inputs if inputs is None else inputs))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("case", [timm, clip, vit, open_clip])
def test_a_batch_is_its_samples_one_by_one(build: Build, case: Callable[[], Case]) -> None:
    one, experts = case_of(case)
    before = deepcopy([one.model.state_dict(), *(e.state_dict() for e in experts.values())])
    model = build(one.model, experts)
    together = features(one, model)
    alone = torch.cat([features(one, model, sample[None]) for sample in one.inputs])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, features(one, one.model), atol=1e-3)
    after = [one.model.state_dict(), *(e.state_dict() for e in experts.values())]
    for x, y in zip(before, after, strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)


@pytest.mark.parametrize("build", [apart, twin])
def test_tokens_come_in_either_order(build: Build) -> None:
    first, experts = case_of(open_clip)
    other = made(open_clip_token_major)
    of_other = {task: perturbed(other.model, t) for t, task in enumerate(experts)}
    for task, expert in of_other.items():
        expert.load_state_dict(experts[task].state_dict())
    square = torch.randn(5, 3, 8, 8)  # as many samples as tokens
    for inputs in (first.inputs, square):
        expected = features(first, build(first.model, experts), inputs)
        found = features(other, build(other.model, of_other), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", BUILDS)
def test_experts_that_changed_nothing_leave_the_base(build: Build) -> None:
    one, _ = case_of()
    same = {"first": one.model, "second": one.model.state_dict()}
    torch.testing.assert_close(features(one, build(one.model, same)), features(one, one.model))


@pytest.mark.parametrize("build", BUILDS)
def test_half_precision_and_autocast(build: Build) -> None:
    one, experts = case_of()
    expected = features(one, build(one.model, experts))
    with torch.autocast("cpu", torch.bfloat16):
        near = features(one, build(one.model, experts))
        assert near.dtype == features(one, one.model).dtype
    narrow = build(one.model.bfloat16(), {task: expert.bfloat16() for task, expert in experts.items()})
    narrow_too = features(one, narrow, one.inputs.bfloat16())
    for close in (near, narrow_too):
        far = (close.float() - expected).norm(dim=-1) > 0.05 * expected.norm(dim=-1)
        assert far.sum() <= BATCH // 3  # of samples one of whose tokens chose another expert


@pytest.mark.parametrize("build", BUILDS)
def test_saved_and_loaded(build: Build, tmp_path: Path) -> None:
    one, experts = case_of()
    model = build(one.model, experts)
    model.save(tmp_path / "routed.safetensors")
    other = perturbed(one.model, 9)  # only its architecture counts
    loaded = type(model).load(tmp_path / "routed.safetensors", other)
    assert torch.equal(features(one, loaded), features(one, model))
    assert loaded.tasks == ("task0", "task1", "task2") and loaded.unrouted == model.unrouted
    assert loaded.training == other.training and not next(loaded.model.parameters()).requires_grad


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    one, experts = case_of()
    path = tmp_path / "routed.safetensors"
    low_rank(one.model, experts).save(path)
    with pytest.raises(ValueError, match="path must be a file written by WEMoE.save"):
        WEMoE.load(path, one.model)
    with pytest.raises(ValueError, match="base must have the layers of the file, got no 'blocks"):
        Smile.load(path, made(clip).model)
    with pytest.raises(ValueError, match="base must have the shapes and dtypes of the file, got .* torch.float64 for"):
        Smile.load(path, deepcopy(one.model).double())
    deeper = deepcopy(one.model)
    deeper.blocks.append(deepcopy(deeper.blocks[0]))
    with pytest.raises(ValueError, match="base must have the tensors of the file, got 'model.blocks.2"):
        Smile.load(path, deeper)


def test_weights_can_be_asked_for_dtype_and_shape_but_not_read() -> None:
    one, experts = case_of()
    layer = apart(one.model, experts).model.blocks[0].mlp.fc1
    plain = one.model.blocks[0].mlp.fc1
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.device) == (
        plain.weight.dtype,
        plain.weight.shape,
        plain.weight.device,
    )
    with pytest.raises(RuntimeError, match="layers with experts must be called, got linear of a weight"):
        nn.functional.linear(torch.zeros(1, 16), layer.weight)


@pytest.mark.parametrize("build", [apart, low_rank, twin])
def test_torchs_own_layers_call_theirs(build: Build) -> None:
    """In evaluation mode they would read the weights of linear layers, unless these have hooks."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.layers = nn.ModuleList(deepcopy(layer) for _ in range(2))

        def forward(self, images: Tensor) -> Tensor:
            tokens = images.flatten(1, 2)
            for layer in self.layers:
                tokens = layer(tokens)
            return tokens

    torch.manual_seed(0)
    base = Model().eval()
    experts = {"a": perturbed(base, 1), "b": perturbed(base, 2)}
    model = build(base, experts)
    images = torch.randn(BATCH, 3, 8, 8)
    with torch.no_grad():
        fast = model(images)
    torch.testing.assert_close(fast, model(images.requires_grad_()).detach(), rtol=1e-4, atol=1e-5)
    assert any("self_attn" in name for name in model.unrouted) or build is apart


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: [m], TypeError, "experts must be a mapping from names of tasks, got list"),
        (lambda m: {}, ValueError, "experts must be of at least one task, got none"),
        (lambda m: {"a": m.head}, ValueError, r"experts\[0\] must have the names of base"),
        (lambda m: {"a": deepcopy(m).double()}, ValueError, "dtype"),
    ],
)
def test_experts_that_are_none(build: Build, change: Any, error: type[Exception], message: str) -> None:
    one, _ = case_of()
    with pytest.raises(error, match=message):
        build(one.model, change(one.model))


@pytest.mark.parametrize("build", BUILDS)
def test_experts_that_are_not_finite(build: Build) -> None:
    one, experts = case_of()
    with torch.no_grad():
        experts["task1"].blocks[0].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises((ValueError, RuntimeError), match="NaN"):
        build(one.model, experts)
