"""PEFT's own merges of adapters against ours, one by one and inside `add_weighted_adapter`."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery_kernels import _C, masks
from surgery_kernels.integrations.tensors import next_seed
from surgery_kernels.ops.masks import unpack
from tests.cases import assert_same, gaussian, grid, inputs, option_id, weights_of
from tests.untied import untied

pytestmark = pytest.mark.any_isa

NAMES = ["ties", "dare_ties", "dare_linear", "magnitude_prune", "task_arithmetic"]
COMBINATIONS = [
    "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune",
    "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
]  # fmt: skip


@pytest.fixture
def integration() -> ModuleType:
    pytest.importorskip("peft", reason="peft is not installed", exc_type=ImportError)
    return importlib.import_module("surgery_kernels.integrations.peft")


def adapters(num_tasks: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    base, experts = untied((40, 37), num_tasks, dtype)
    return [expert - base for expert in experts]


def both(integration: ModuleType, name: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """PEFT's result and ours, from one state of torch's random numbers and with PEFT's draws."""
    torch.manual_seed(7)
    expected = getattr(integration.merge_utils, name)(*arguments)
    torch.manual_seed(7)
    options = {"exact_draws": True} if name.startswith("dare") else {}
    return expected, getattr(integration, name)(*arguments, **options)


def options_of(name: str, density: float = 0.3) -> list[tuple[Any, ...]]:
    if name == "task_arithmetic":
        return [()]
    if name in ("ties", "dare_ties"):
        return [(density, "total"), (density, "frequency")]
    return [(density,)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("name", NAMES)
def test_same_as_peft(integration: ModuleType, name: str, dtype: torch.dtype) -> None:
    for num_tasks in (1, 3, 4):
        tensors = adapters(num_tasks, dtype)
        weights = torch.tensor(weights_of(num_tasks))
        for options in options_of(name):
            expected, actual = both(integration, name, tensors, weights, *options)
            assert_same(actual, expected, f"{num_tasks} adapters, {options}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("name", ["dare_ties", "dare_linear", "task_arithmetic"])
def test_ties_do_not_matter_without_a_trim(integration: ModuleType, name: str, dtype: torch.dtype) -> None:
    _, tensors = inputs(gaussian, (67, 61), 4, dtype)
    for options in options_of(name, 0.5):
        expected, actual = both(integration, name, tensors, torch.tensor(weights_of(4)), *options)
        assert_same(actual, expected, str(options))


@pytest.mark.parametrize("name", ["ties", "magnitude_prune"])
def test_tied_entries_are_kept_in_flat_order(
    integration: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def topk(x: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
        values, indices = torch.sort(x, descending=largest, stable=True)
        return values[:k], indices[:k]

    monkeypatch.setattr(torch, "topk", topk)
    for dtype in (torch.float32, torch.bfloat16):
        _, tensors = inputs(grid, (67, 61), 4, dtype)
        for options in options_of(name):
            expected, actual = both(integration, name, tensors, torch.tensor(weights_of(4)), *options)
            assert_same(actual, expected, f"{dtype}, {options}")


@pytest.mark.parametrize("name", NAMES)
def test_many_adapters(integration: ModuleType, name: str) -> None:
    tensors = adapters(9)
    # dyadic weights and density: all sums are exact, in whatever order torch adds
    for options in options_of(name, 0.25):
        expected, actual = both(integration, name, tensors, torch.tensor([1.0, 0.5, 0.25] * 3), *options)
        assert_same(actual, expected, str(options))


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_where_it_is(integration: ModuleType, name: str) -> None:
    tensors = adapters(3)
    tensors[1][3, 5] = torch.nan
    expected, actual = both(integration, name, tensors, torch.ones(3), *options_of(name)[0])
    assert expected.isnan().sum() == 1
    assert_same(actual, expected)


def test_leaves_the_rest_to_peft(integration: ModuleType) -> None:
    tensors = adapters(2)
    weights = torch.ones(2)
    before = _C.bytes_read()
    for name in NAMES:
        options = options_of(name)[0]
        assert_same(*both(integration, name, tensors, weights.double(), *options))
        assert_same(*both(integration, name, tensors, weights.long(), *options))
        leaf = tensors[0].clone().requires_grad_()
        getattr(integration, name)([leaf, tensors[1]], weights, *options).sum().backward()
        assert leaf.grad is not None
    for name in ("ties", "magnitude_prune"):
        assert_same(*both(integration, name, tensors, weights, 0.0))
        with pytest.warns(UserWarning, match="no pruning will be performed"):
            assert_same(*both(integration, name, tensors, weights, 1.0))
    for name in ("ties", "dare_ties", "dare_linear", "magnitude_prune"):
        with pytest.raises(ValueError, match="Density should be >= 0"):
            getattr(integration, name)(tensors, weights, -0.5)
    for name in ("ties", "dare_ties"):
        with pytest.raises(RuntimeError, match="Unimplemented mask method"):
            getattr(integration, name)(tensors, weights, 0.5, "loudest")
    on_meta = [tensor.to("meta") for tensor in tensors]
    assert integration.task_arithmetic(on_meta, weights.to("meta")).device.type == "meta"
    assert _C.bytes_read() == before


class Network(nn.Module):
    """Every kind of layer that has a branch of its own in the merge."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.conv = nn.Conv2d(16, 16, (3, 1))
        self.proj = nn.Linear(16, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(self.conv(self.embed(tokens).mT[..., None])[..., 0].mT)


@pytest.fixture
def model(integration: ModuleType) -> Any:
    """A model with three LoRA adapters no two of whose entries have one magnitude."""
    import peft

    def config(alpha: int) -> Any:
        return peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["embed", "conv", "proj"])

    adapted = peft.get_peft_model(Network(), config(8), adapter_name="first")
    adapted.add_adapter("second", config(4))
    adapted.add_adapter("third", config(6))
    with torch.no_grad():
        for i, adapter in enumerate(("first", "second", "third")):
            for name, parameter in adapted.named_parameters():
                if f".{adapter}." in f"{name}.":
                    parameter.copy_(untied(parameter.shape, 3, torch.float32)[1][i] / 64)
    return adapted


def combined(model: Any, combination: str, name: str, density: float = 0.4) -> dict[str, Tensor]:
    """The tensors of the merged adapter, which is removed again."""
    torch.manual_seed(7)
    options = {"density": density} if combination not in ("linear", "svd") else {}
    model.add_weighted_adapter(["first", "second", "third"], [1.0, 0.5, -0.75], name, combination, **options)
    tensors = {key: x.detach().clone() for key, x in model.named_parameters() if f".{name}." in f"{key}."}
    model.delete_adapter(name)
    return {key.replace(name, "merged"): x for key, x in tensors.items()}


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_add_weighted_adapter(integration: ModuleType, model: Any, combination: str) -> None:
    before = _C.bytes_read()
    expected = combined(model, combination, "stock")
    assert _C.bytes_read() == before
    with integration.accelerated(exact_draws=True):
        actual = combined(model, combination, "ours")
    assert _C.bytes_read() > before
    assert len(expected) == 6
    assert actual.keys() == expected.keys()
    for key in expected:
        assert_same(actual[key], expected[key], key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=option_id)
@pytest.mark.parametrize("elect", ["total", "frequency"])
def test_own_draws(integration: ModuleType, elect: str, dtype: torch.dtype) -> None:
    """PEFT's formula for the masks of the op, whose seed is torch's next number."""
    _, tensors = inputs(gaussian, (67, 61), 3, dtype)
    weights, density = torch.tensor([0.7, -0.3, 1.1]), 0.3
    for name, majority in (("dare_linear", []), ("dare_ties", [elect])):
        torch.manual_seed(7)
        actual = getattr(integration, name)(tensors, weights, density, *majority)
        torch.manual_seed(7)
        packed, sums = masks(None, tensors, density=density, seed=next_seed())
        assert ((sums[:, 0] / tensors[0].numel() - density).abs() < 5 * (0.21 / tensors[0].numel()) ** 0.5).all()
        kept = [x.double() * mask / density for x, mask in zip(tensors, unpack(packed, (67, 61)), strict=True)]
        plain = integration.merge_utils.task_arithmetic if name == "dare_linear" else integration.merge_utils.ties
        with warnings.catch_warnings(action="ignore"):  # PEFT's, of density 1
            expected = plain(kept, weights.double(), *([1.0, elect] if name == "dare_ties" else []))
        assert actual.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
        torch.manual_seed(8)
        assert not torch.equal(getattr(integration, name)(tensors, weights, density, *majority), actual)


@pytest.mark.parametrize("combination", ["dare_linear", "dare_ties", "ties", "magnitude_prune"])
def test_density_0_keeps_nothing(integration: ModuleType, model: Any, combination: str) -> None:
    for exact_draws in (False, True):
        with integration.accelerated(exact_draws=exact_draws):
            merged = combined(model, combination, "ours", density=0.0)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in merged.values())


@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties"])
def test_rank_stabilized_adapters_keep_their_scale(integration: ModuleType, tmp_path: Path, combination: str) -> None:
    """One with weight 1 comes back as it was, in memory and from its file."""
    peft = importlib.import_module("peft")
    network = nn.Sequential(nn.Linear(16, 16))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False, use_rslora=True)
    model = peft.get_peft_model(network, config, adapter_name="one")
    layer = model.base_model.model[0]
    expected = layer.get_delta_weight("one")
    with integration.accelerated():
        options = {"density": 1.0} if combination == "ties" else {}
        model.add_weighted_adapter(["one"], [1.0], "merged", combination, **options)
    torch.testing.assert_close(layer.get_delta_weight("merged"), expected)
    layer.set_scale("merged", 2.0)
    torch.testing.assert_close(layer.get_delta_weight("merged"), 2 * expected)
    model.save_pretrained(str(tmp_path), selected_adapters=["merged"])
    model.load_adapter(str(tmp_path / "merged"), "again")
    torch.testing.assert_close(layer.get_delta_weight("again"), expected)
    assert model.peft_config["one"].use_rslora


@pytest.mark.parametrize("name", NAMES)
def test_gpu_tensors_take_the_triton_kernels(
    integration: ModuleType, monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str
) -> None:
    tensors, weights = adapters(3), torch.tensor(weights_of(3))
    expected = [ours_of(integration, name, tensors, weights, options) for options in options_of(name)]
    monkeypatch.delattr(integration.merge_utils, name)  # nothing is left to PEFT
    on_gpu = [tensor.to(device) for tensor in tensors], weights.to(device)
    before = _C.bytes_read()
    actual = [ours_of(integration, name, *on_gpu, options) for options in options_of(name)]
    assert _C.bytes_read() == before  # nor to the kernels of the CPU
    for x, y in zip(actual, expected, strict=True):
        assert x.device.type == device.type
        assert_same(x.cpu(), y, name)


def ours_of(integration: ModuleType, name: str, tensors: list[Tensor], weights: Tensor, options: Any) -> Tensor:
    torch.manual_seed(7)
    return getattr(integration, name)(tensors, weights, *options)


def swapped(integration: ModuleType) -> list[bool]:
    return [getattr(integration.lora, name) is not getattr(integration.merge_utils, name) for name in NAMES]


def test_swaps_and_restores(integration: ModuleType) -> None:
    stock = {name: getattr(integration.lora, name) for name in NAMES}
    with integration.accelerated():
        assert all(swapped(integration))
        with integration.accelerated():
            assert all(swapped(integration))
        assert all(swapped(integration))
    assert {name: getattr(integration.lora, name) for name in NAMES} == stock
    with pytest.raises(ZeroDivisionError), integration.accelerated():
        1 / 0  # noqa: B018
    assert {name: getattr(integration.lora, name) for name in NAMES} == stock


def test_blocks_agree_about_draws(integration: ModuleType) -> None:
    with integration.accelerated(exact_draws=True):
        message = "^exact_draws must be True as in the block around, got False$"
        with pytest.raises(ValueError, match=message), integration.accelerated():
            pass
        assert all(swapped(integration))
    with integration.accelerated():
        pass


def test_blocks_may_overlap(integration: ModuleType) -> None:
    """As those of two threads do: the first to begin is not the last to end."""
    first, second = integration.accelerated(), integration.accelerated()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert all(swapped(integration))
    second.__exit__(None, None, None)
    assert not any(swapped(integration))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    monkeypatch.delitem(sys.modules, "surgery_kernels.integrations.peft", raising=False)
    message = r"^peft must be installed in a version .* run `pip install 'surgery-kernels\[peft\]'`$"
    with pytest.raises(ImportError, match=message):
        importlib.import_module("surgery_kernels.integrations.peft")
