"""Adapters as experts: against PEFT's own merge, and everything that is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from tests.checkpoints import save_lora, save_safetensors, save_torch, state_dict, write_zeros

pytestmark = pytest.mark.any_isa

MIB = 1 << 20


class Model(nn.Module):
    """A module of every kind that PEFT adds a product to."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.wide = nn.Linear(8, 12)
        self.square = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 5, 3)
        self.pointwise = nn.Conv2d(3, 5, 1)
        self.sequence = nn.Conv1d(3, 4, 3)
        self.head = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)


class Transposed(nn.Module):
    """Weights [inputs, outputs], as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = Conv1D(12, 8)
        self.square = Conv1D(8, 8)


MODULES = ["wide", "square", "conv", "pointwise", "sequence"]
CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (Model, {"target_modules": [*MODULES, "embed"], "lora_alpha": 5, "modules_to_save": ["head", "norm"]}),
    "rank-stabilized": (Model, {"target_modules": [*MODULES, "embed"], "use_rslora": True}),
    "patterns": (
        Model,
        {
            "target_modules": MODULES,
            "rank_pattern": {"wide": 3, "conv": 1},
            "alpha_pattern": {"s.*": 7, "wide": 2},
            "use_rslora": True,
        },
    ),
    "bias": (Model, {"target_modules": MODULES, "lora_bias": True, "bias": "lora_only", "lora_alpha": 16}),
    "all biases": (Model, {"target_modules": MODULES, "bias": "all"}),
    "norms": (Model, {"target_modules": [*MODULES, "embed"], "use_dora": True, "lora_alpha": 5}),
    "transposed norms": (Transposed, {"target_modules": ["wide", "square"], "use_dora": True, "fan_in_fan_out": True}),
    "transposed": (Transposed, {"target_modules": ["wide", "square"], "fan_in_fan_out": True}),
}


def trained(folder: Path, model: type[nn.Module], dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    """Saves base and adapter; the weights that PEFT makes of them."""
    torch.manual_seed(0)
    base = model().to(dtype)
    save_file(base.state_dict(), folder / "base.safetensors")
    with_adapter = get_peft_model(base, LoraConfig(r=4, **options))
    for parameter in with_adapter.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    with_adapter.save_pretrained(str(folder / "adapter"))
    fresh = model().to(dtype)
    fresh.load_state_dict(load_file(folder / "base.safetensors"))
    return PeftModel.from_pretrained(fresh, str(folder / "adapter")).merge_and_unload().state_dict()


# an adapter with biases looks to PEFT like one of another kind
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_merges_as_peft_does(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    expected = trained(tmp_path, CASES[case][0], dtype, CASES[case][1])
    base = open_checkpoint(tmp_path / "base.safetensors")
    expert = open_checkpoint(tmp_path / "adapter", base=base)
    assert expert.tensors.keys() == base.tensors.keys() == expected.keys()
    changed = {name for name in base.tensors if not torch.equal(expected[name], base.tensor(name))}
    assert expert.changed >= changed and len(expert.changed) < len(base.tensors) + (case in ("bias", "transposed"))
    for name, info in expert.tensors.items():
        found = expert.tensor(name)
        assert found.dtype == info.dtype == dtype and found.shape == info.shape == base.tensors[name].shape
        # PEFT rounds the product to the dtype of the adapter first, which is that of a float16 base at the least
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps)
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(found, expected[name].to(dtype), rtol=tolerance, atol=tolerance * scale)
        if name not in expert.changed:
            assert found.data_ptr() == base.tensor(name).data_ptr() and info == base.tensors[name]
        else:
            assert info.file is None and info.offset is None


def exact(weight: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """Inputs are small integers and scaling a power of two: exact in float32, so rounded once."""
    return (weight.double() + scaling * (up.double() @ down.double())).to(weight.dtype)


def integers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, down, up = torch.randn(301, 33).mul(64).round().div(64).to(dtype), integers(16, 33), integers(301, 16)
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"layer.weight": weight}))
    expert = open_checkpoint(save_lora(tmp_path / "adapter", {"layer": (down, up)}, lora_alpha=4), base=base)
    assert torch.equal(expert.tensor("layer.weight"), exact(weight, down, up, 0.25))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounded_once_to_another_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Not to that of the base before."""
    torch.manual_seed(0)
    weight, down, up = torch.randn(301, 33).bfloat16(), integers(2, 33), integers(301, 2)
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"layer.weight": weight, "head.weight": -weight}))
    whole = {"head.weight": torch.randn(301, 33)}
    adapter = save_lora(tmp_path / "adapter", {"layer": (down, up)}, whole, modules_to_save=["head"], lora_alpha=2)
    expert = open_checkpoint(adapter, base=base, lora_dtype=dtype)
    for name, expected in {"layer.weight": weight.double() + up.double() @ down.double(), **whole}.items():
        info = expert.tensors[name]
        assert (info.dtype, info.nbytes) == (dtype, 301 * 33 * dtype.itemsize)
        assert torch.equal(expert.tensor(name), expected.to(dtype))


def test_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery_kernels.checkpoint.reading.lora_product.BLOCK", 100)
    torch.manual_seed(0)
    tall, wide = integers(77, 9), integers(3, 500)
    factors = {"tall": (integers(2, 9), integers(77, 2)), "wide": (integers(2, 500), integers(3, 2))}
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"tall.weight": tall, "wide.weight": wide}))
    expert = open_checkpoint(save_lora(tmp_path / "adapter", factors), base=base)
    for name, weight in (("tall", tall), ("wide", wide)):
        assert torch.equal(expert.tensor(f"{name}.weight"), exact(weight, *factors[name], 8))


@pytest.mark.usefixtures("restored_threads")
def test_threads_do_not_matter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"layer.weight": torch.randn(700, 900)}))
    factors = {"layer": (torch.randn(24, 900), torch.randn(700, 24))}
    expert = open_checkpoint(save_lora(tmp_path / "adapter", factors), base=base)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(expert.tensor("layer.weight"))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("has, wants", [("", "transformer."), ("bert.", ""), ("", "")], ids=str)
def test_models_with_and_without_a_head(tmp_path: Path, has: str, wants: str) -> None:
    weight, down, up = integers(5, 4), integers(2, 4), integers(5, 2)
    tensors = {f"{has}layers.0.weight": weight, f"{has}layers.1.weight": weight.clone()}
    base = open_checkpoint(save_safetensors(tmp_path / "base", tensors))
    adapter = save_lora(tmp_path / "adapter", {f"{wants}layers.1": (down, up)})
    expert = open_checkpoint(adapter, base=base)
    assert expert.changed == {f"{has}layers.1.weight"}
    assert torch.equal(expert.tensor(f"{has}layers.1.weight"), exact(weight, down, up, 8))


def test_tied_weights(tmp_path: Path) -> None:
    weight, down, up = integers(5, 4), integers(2, 4), integers(5, 2)
    tensors = {"embed.weight": weight, "head.weight": weight, "bias": integers(5)}
    base = open_checkpoint(save_torch(tmp_path / "base", tensors))
    expert = open_checkpoint(save_lora(tmp_path / "adapter", {"head": (down, up)}), base=base)
    assert expert.tied == {"head.weight": "embed.weight"} and expert.changed == {"embed.weight", "head.weight"}
    for name in expert.changed:
        assert torch.equal(expert.tensor(name), exact(weight, down, up, 8))
    twice = save_lora(tmp_path / "twice", {"head": (down, up), "embed": (down, up)})
    refused(twice, base, f"{twice} must change every tensor of {base.name} once, got 'head.weight' twice")


def test_a_product_on_what_was_replaced(tmp_path: Path) -> None:
    weight, down, up = integers(5, 4), integers(2, 4), integers(5, 2)
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"layer.weight": torch.zeros(5, 4)}))
    adapter = save_lora(tmp_path / "adapter", {"layer": (down, up)}, {"layer.base_layer.weight": weight})
    assert torch.equal(open_checkpoint(adapter, base=base).tensor("layer.weight"), exact(weight, down, up, 8))


def test_whole_tensors_take_the_dtype_of_the_base(tmp_path: Path) -> None:
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"head.weight": torch.zeros(5, dtype=torch.bfloat16)}))
    whole = torch.randn(5)
    expert = open_checkpoint(save_lora(tmp_path / "adapter", {}, {"head.weight": whole}), base=base)
    assert torch.equal(expert.tensor("head.weight"), whole.bfloat16())


def test_adapters_of_torch_and_adapters_on_adapters(tmp_path: Path) -> None:
    weight, down, up = integers(5, 4), integers(2, 4), integers(5, 2)
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"layer.weight": weight}, config={"a": 1}))
    adapter = save_lora(tmp_path / "adapter", {"layer": (down, up)})
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    first = open_checkpoint(adapter, base=base)
    second = open_checkpoint(adapter, base=first)
    once = exact(weight, down, up, 8)
    assert torch.equal(second.tensor("layer.weight"), exact(once, down, up, 8))
    assert first.folder == base.folder and first.config == {"a": 1} and first.name == str(adapter)
    assert {file.path.name for file in first.files} == {"model.safetensors", "adapter_model.bin", "adapter_config.json"}
    first.release()
    first.close()
    assert torch.equal(base.tensor("layer.weight"), weight)


def test_empty_weights(tmp_path: Path) -> None:
    base = open_checkpoint(save_safetensors(tmp_path / "base", {"layer.weight": torch.zeros(0, 4)}))
    adapter = save_lora(tmp_path / "adapter", {"layer": (torch.zeros(2, 4), torch.zeros(0, 2))})
    assert open_checkpoint(adapter, base=base).tensor("layer.weight").shape == (0, 4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_memory(run_python: Callable[..., str], tmp_path: Path) -> None:
    shape = (8192, 4096)  # 64 MiB: the pages of the base, the result, and the block and factors
    base = write_zeros(tmp_path / "base.safetensors", {f"layers.{i}.weight": shape for i in range(2)}, torch.bfloat16)
    factors = (torch.zeros(8, shape[1]), torch.zeros(shape[0], 8))
    adapter = save_lora(tmp_path / "adapter", {f"layers.{i}": factors for i in range(2)})
    assert int(run_python("-m", "tests.read_memory", "released", str(base), str(adapter))) < (2 * 64 + 32) * MIB


def refused(adapter: Path, base: Any, message: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        open_checkpoint(adapter, base=base)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"peft_type": "IA3"}, "have the peft_type 'LORA', got 'IA3'"),
        ({"peft_type": None}, "have the peft_type 'LORA', got None"),
        ({"use_qalora": True}, "be of a plain LoRA, got use_qalora=True"),
        ({"layer_replication": [[0, 2]]}, "be of a plain LoRA, got layer_replication=[[0, 2]]"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "be of a LoRA that leaves its base as it is, got init_lora_weights='pissa_niter_4'",
        ),
        ({"rank_pattern": [3]}, "have rank_pattern and alpha_pattern by module, got [[3], {}]"),
        ({"r": 3}, "have the rank of 'layers.0', 2, got 3"),
        ({"rank_pattern": {"layers.0": 1}}, "have the rank of 'layers.0', 2, got 1"),
        ({"rank_pattern": {"(": 1}}, "have regular expressions as patterns of modules, got '('"),
        ({"lora_alpha": "16"}, "have a finite lora_alpha for 'layers.0', got '16'"),
        ({"alpha_pattern": {"0": math.nan}}, "have a finite lora_alpha for 'layers.0', got nan"),
    ],
    ids=str,
)
def test_settings_that_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    base = open_checkpoint(save_safetensors(tmp_path / "base", state_dict()))
    adapter = save_lora(tmp_path / "adapter", {"layers.0": (torch.zeros(2, 6), torch.zeros(6, 2))}, **options)
    refused(adapter, base, f"{adapter / 'adapter_config.json'} must {message}")


def test_adapters_that_do_not_fit(tmp_path: Path) -> None:
    base = open_checkpoint(save_safetensors(tmp_path / "base", {**state_dict(), "ids.weight": torch.ones(6, 6).long()}))
    adapter, down, up = tmp_path / "adapter", torch.zeros(2, 6), torch.zeros(6, 2)

    def check(message: str, factors: dict[str, Any], whole: dict[str, Tensor] | None = None) -> None:
        refused(save_lora(adapter, factors, whole), base, f"{adapter} must {message}")

    check(f"change tensors of {base.name}, got 'layers.5.weight', which it has not", {"layers.5": (down, up)})
    dora = "have a lora_magnitude_vector of 'layers.0' exactly where use_dora is true, got lora_magnitude_vector and "
    check(f"{dora}use_dora=False", {"layers.0": (down, up)}, {"layers.0.lora_magnitude_vector": torch.ones(6)})
    check("have lora_A and lora_B of 'layers.0', got only lora_A", {}, {"layers.0.lora_A.weight": down})
    alone = {"layers.0.lora_B.bias": torch.ones(6)}
    check("have lora_A and lora_B of 'layers.0', got only lora_B.bias", {}, alone)
    shapes = "have factors of 'layers.0' whose product has the shape of the base, (6, 6), got "
    check(f"{shapes}(2, 7) and (6, 2)", {"layers.0": (torch.zeros(2, 7), up)})
    check(f"{shapes}(2, 6) and (6, 3)", {"layers.0": (down, torch.zeros(6, 3))})
    check(f"{shapes}(0, 6) and (6, 0)", {"layers.0": (torch.zeros(0, 6), torch.zeros(6, 0))})
    dtypes = "have floating-point factors for a weight of float64, float32, float16 or bfloat16, got "
    check(f"{dtypes}'ids' with torch.float32 and torch.float32 for torch.int64", {"ids": (down, up)})
    check(f"{dtypes}'layers.0' with torch.int64 and torch.float32 for torch.float32", {"layers.0": (down.long(), up)})
    check(
        "have 'base_model.model.layers.0.bias' in the shape of the base, (6,), got (7,)",
        {},
        {"layers.0.bias": torch.ones(7)},
    )
    bias = {"layers.0.lora_B.bias": torch.ones(7)}
    check(
        "have 'base_model.model.layers.0.lora_B.bias' in the shape of the base, (6,), got (7,)",
        {"layers.0": (down, up)},
        bias,
    )


def test_adapters_without_what_they_need(tmp_path: Path) -> None:
    adapter = save_lora(tmp_path / "adapter", {"layers.0": (torch.zeros(2, 6), torch.zeros(6, 2))})
    refused(adapter, None, f"base must be given for {adapter}, which is an adapter, got None")
    quantized = open_checkpoint(
        save_safetensors(tmp_path / "base", state_dict(), config={"quantization_config": {"bits": 4}})
    )
    message = (
        f"models must be without quantization, got {quantized.name}, which is quantized (quantization_config in its "
        f"config.json, to be removed from there if its numbers are plain): dequantize it first, or take the model it "
        f"was made from"
    )
    refused(adapter, quantized, message)
    base = open_checkpoint(save_safetensors(tmp_path / "plain", state_dict()))
    (adapter / "adapter_model.safetensors").unlink()
    message = f"{adapter} must be a folder with adapter_model.safetensors or adapter_model.bin, got neither of them"
    refused(adapter, base, message, FileNotFoundError)
    (adapter / "adapter_config.json").write_text(json.dumps([]))
    refused(adapter, base, f"{adapter / 'adapter_config.json'} must hold a JSON object, got list")
