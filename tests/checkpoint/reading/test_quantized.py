"""Tensors that are no weights are told by their names, dtypes and configs; those that look like them are merged."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery_kernels.checkpoint import merge
from surgery_kernels.checkpoint.differences import ALLOWABLE
from surgery_kernels.checkpoint.reading.opening import open_checkpoint
from surgery_kernels.checkpoint.reading.quantized import check_plain
from tests.checkpoints import refused, save_safetensors, write_safetensors

pytestmark = pytest.mark.any_isa

LAYER = "model.layers.0.mlp.up_proj"
SCALE = torch.rand(1)


def bytes_(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.uint8)


def words(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int32)


def float8(*shape: int) -> Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


def float16(*shape: int) -> Tensor:
    return torch.ones(shape).half()


# what lies in the files, by the ends of the names
QUANTIZED: dict[str, dict[str, Tensor]] = {
    "GPTQ": {"qweight": words(2, 16), "qzeros": words(1, 2), "scales": float16(1, 16), "g_idx": words(16)},
    "AWQ": {"qweight": words(16, 2), "qzeros": words(1, 2), "scales": float16(1, 16)},
    "bitsandbytes 8 bit": {"SCB": SCALE, "weight": torch.ones(4, 4, dtype=torch.int8)},
    "bitsandbytes 4 bit": {"weight.absmax": SCALE, "weight.quant_map": torch.rand(16), "weight": bytes_(8, 1)},
    "bitsandbytes nested": {"weight.nested_absmax": SCALE, "weight": bytes_(8, 1)},
    "bitsandbytes state": {"weight.quant_state.bitsandbytes__nf4": bytes_(9), "weight": bytes_(8, 1)},
    "int8 and nothing": {"weight": torch.ones(4, 4, dtype=torch.int8)},
    "EETQ": {"weight_scales": float16(4), "weight": torch.ones(4, 4, dtype=torch.int8)},
    "MLX": {"weight": words(4, 4).to(torch.uint32), "scales": float16(4, 1), "biases": float16(4, 1)},
    "BitNet": {"weight_scale": SCALE, "weight": bytes_(4, 4)},
    "FP8": {"weight_scale": SCALE, "weight": float8(4, 4)},
    "FP8 dequantized by half": {"weight_scale": SCALE, "weight": float16(4, 4)},
    "FP8 with static inputs": {"input_scale": SCALE, "weight": float16(4, 4)},
    "FP8 of ComfyUI": {"scale_weight": SCALE, "weight": float8(4, 4)},
    "FP8 of ComfyUI, marked": {"comfy_quant": bytes_(9), "weight": float16(4, 4)},
    "FP8 in blocks": {"weight_scale_inv": SCALE, "weight": float8(4, 4)},
    "FP8 of FBGEMM": {"input_scale_ub": SCALE, "weight": float8(4, 4)},
    "FP8 of Mistral": {"qscale_weight": SCALE, "weight": float8(4, 4)},
    "FP8 of DeepSeek's own files": {"weight": float8(4, 4), "scale": SCALE},
    "FP8, some other name": {"weight": float8(4, 4), "weight_descale_factor": SCALE},
    "FP8, behind a dot": {"weight": float8(4, 4), "weight.amax_history": SCALE},
    "FP8 with block exponents": {"weight_block": torch.ones(2).to(torch.float8_e8m0fnu), "weight": float8(4, 4)},
    "NVFP4": {"weight_scale_2": SCALE, "weight_scale": float8(4, 1), "weight": bytes_(4, 2)},
    "compressed-tensors": {"weight_packed": words(4, 1), "weight_scale": float16(4, 1), "weight_shape": words(2)},
    "compressed-tensors, sparse": {"bitmask": bytes_(4, 1), "compressed": float16(8)},
    "ModelOpt": {"weight_quantizer._amax": SCALE, "weight": float16(4, 4)},
    "quanto": {"weight._data": torch.ones(4, 4, dtype=torch.int8), "weight._scale": SCALE},
    "torchao": {"_weight_qdata": torch.ones(4, 4, dtype=torch.int8), "_weight_scale": SCALE},
    "HQQ": {"W_q": bytes_(4, 2), "meta": SCALE},
    "AQLM": {"codes": torch.ones(4, 4, dtype=torch.int8), "codebooks": float16(1, 2, 1, 8)},
    "VPTQ": {"indices": words(4, 4), "centroids.weight": float16(1, 8)},
    "EXL2": {"q_weight": words(4, 4), "q_scale": words(4)},
    "EXL3": {"trellis": words(4, 4).short(), "suh": float16(4)},
    "SpQR": {"dense_weights": words(4).long()},
    "QuIP#": {"Qidxs": words(4, 4), "SU": float16(4)},
    "Marlin": {"B": words(4, 4), "s": float16(4)},
    "TensorRT-LLM": {"weights_scaling_factor": SCALE, "weight": float8(4, 4)},
    "SVDQuant": {"wscales": float16(4), "qweight": torch.ones(4, 4, dtype=torch.int8)},
}
EXPERTS = "model.layers.0.mlp.experts"
# the same of names that stand for themselves
BY_FULL_NAME: dict[str, dict[str, Tensor]] = {
    "MXFP4": {f"{EXPERTS}.down_proj_blocks": bytes_(2, 4, 1, 16), f"{EXPERTS}.down_proj_scales": bytes_(2, 4, 1)},
    "fused experts": {f"{EXPERTS}.gate_up_proj_scale_inv": SCALE, f"{EXPERTS}.gate_up_proj": float8(2, 4, 4)},
    "fused experts, packed": {f"{EXPERTS}.gate_up_proj": bytes_(2, 4, 4)},
    "a component": {"transformer/scaled_fp8": float8(0), "transformer/blocks.0.weight": float16(4, 4)},
    "a flag of ComfyUI": {"scaled_fp8": float8(0), "blocks.0.weight": float16(4, 4)},
    "scales of their own": {"blocks.0.q.weight": float8(4, 4), "scales.blocks.0.q.weight": SCALE},
    "scales of a part": {"blocks.0.q.weight": float8(4, 4), "blocks.0.q.dequant.scale": SCALE},
    "key-value cache": {"model.layers.0.self_attn.v_proj.v_scale": SCALE, "norm.weight": float16(4)},
}
FACTORS: dict[str, dict[str, Tensor]] = {
    "PEFT": {f"{LAYER}.lora_A.weight": torch.rand(2, 4), f"{LAYER}.lora_B.weight": torch.rand(4, 2)},
    "PEFT in a model": {
        f"{LAYER}.lora_A.default.weight": torch.rand(2, 4),
        f"{LAYER}.base_layer.weight": torch.rand(4),
    },
    "PEFT's embeddings": {"embed_tokens.lora_embedding_A": torch.rand(2, 4)},
    "kohya": {"lora_unet_mid.lora_up.weight": torch.rand(4, 2), "lora_unet_mid.lora_down.weight": torch.rand(2, 4)},
    "kohya, convolutions": {"lora_unet_mid.lora_mid.weight": torch.rand(2, 2, 3, 3)},
    "diffusers": {"unet.mid.attn1.to_q.lora.down.weight": torch.rand(2, 4)},
    "diffusers, older": {"mid.attn1.processor.to_q_lora.up.weight": torch.rand(4, 2)},
    "diffusers, text": {"text_encoder.q_proj.lora_linear_layer.up.weight": torch.rand(4, 2)},
    "XLabs": {"double_blocks.0.processor.qkv_lora1.up.weight": torch.rand(4, 2)},
    "LoHa": {"lora_unet_mid.hada_w1_a": torch.rand(4, 2), "lora_unet_mid.hada_w1_b": torch.rand(2, 4)},
    "LoHa of PEFT": {"mid.hada_w1_a.default": torch.rand(4, 2)},
    "LoKr": {"lora_unet_mid.lokr_w1": torch.rand(4, 2), "lora_unet_mid.lokr_w2_a": torch.rand(2, 4)},
    "LoKr, Tucker": {"lora_unet_mid.lokr_t2": torch.rand(4, 2)},
    "OFT": {"lora_unet_mid.oft_blocks": torch.rand(4, 2)},
    "IA3": {"layers.0.ia3_l": torch.rand(4)},
    "VeRA": {"layers.0.vera_lambda_b": torch.rand(4)},
}
# Names that only look like it; all are merged.
PLAIN: dict[str, Tensor] = {
    "model.norm.scale": torch.rand(4),
    "double_blocks.0.img_attn.qkv.weight": float8(4, 4),
    "double_blocks.0.img_attn.norm.query_norm.scale": float8(4),
    "double_blocks.0.norm1.scale.weight": torch.rand(4),
    "logit_scale": torch.rand(1),
    "text_projection": float8(4, 4),
    "layers.0.layer_scale_1": torch.rand(4),
    "layers.0.attn.q_scale": torch.rand(4),
    "layers.0.attn.k_scale": torch.rand(4),
    "layers.0.altup.correct_output_scale": torch.rand(4),
    "layers.0.w_lora.lora.0.weight": torch.rand(4, 4),
    "quantizer.codebook.embed": torch.rand(4, 4),
    "layers.0.q_a_proj.weight": torch.rand(4, 4),
    "layers.0.position_ids": torch.arange(4),
    "layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
    "layers.0.attn.weight_mask": torch.ones(4, dtype=torch.bool),
    "batch_norm.num_batches_tracked": torch.tensor(5),
    "roberta.embeddings.indices": torch.arange(4),
    "s": torch.rand(4),
    "experts.gate_up_proj": torch.rand(2, 4, 4),
}
DEQUANTIZE = "dequantize it first, or take the model it was made from"


def of_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{LAYER}.{end}": tensor for end, tensor in tensors.items()}


def merge_of(folder: Path) -> dict[str, Any]:
    models = [{"model": str(folder), "parameters": {"weight": 1}} for _ in range(2)]
    return {"merge_method": "linear", "models": models, "dtype": "float32"}


def refused_in_a_merge(folder: Path, message: str) -> None:
    """With everything allowed, and before any hint what to allow."""
    for allow in ((), tuple(ALLOWABLE)):
        with pytest.raises(ValueError, match=message):
            merge(merge_of(folder), folder.parent / "out", allow=allow)


@pytest.mark.parametrize(
    "tensors", [*map(of_layer, QUANTIZED.values()), *BY_FULL_NAME.values()], ids=[*QUANTIZED, *BY_FULL_NAME]
)
def test_quantized_numbers_are_known_by_their_tensors(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = save_safetensors(tmp_path, {**tensors, "model.norm.weight": torch.rand(4)})
    path = folder / "model.safetensors"
    message = (
        rf"^models must be without quantization, got {re.escape(str(path))}, which is quantized "
        rf"\([^()]+: '({'|'.join(map(re.escape, tensors))})' in \w+\): {DEQUANTIZE}$"
    )
    with pytest.raises(ValueError, match=message):
        check_plain(open_checkpoint(path))


@pytest.mark.parametrize("case", ["GPTQ", "bitsandbytes 8 bit", "FP8"])
def test_nothing_that_is_allowed_lets_them_in(tmp_path: Path, case: str) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 1}
    folder = save_safetensors(tmp_path / "model", of_layer(QUANTIZED[case]), config=config)
    refused_in_a_merge(folder, f"^models must be without quantization, got {re.escape(str(folder))}, which is ")


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("quantization_config", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
    ("text_config.quantization_config", {"text_config": {"quantization_config": {"quant_method": "awq"}}}),
    ("a.b.quantization_config", {"a": {"b": {"quantization_config": {"quant_method": "fp8"}}}}),
    ("compression_config", {"compression_config": {"format": "pack-quantized"}}),
    ("quantization", {"quantization": {"group_size": 64, "bits": 4}}),
]


@pytest.mark.parametrize(("key", "config"), CONFIGS, ids=[key for key, _ in CONFIGS])
def test_quantized_models_are_known_by_their_config(tmp_path: Path, key: str, config: dict[str, Any]) -> None:
    folder = save_safetensors(tmp_path / "model", {"w.weight": torch.rand(4, 4)}, config=config)
    message = (
        f"models must be without quantization, got {folder}, which is quantized ({key} in its config.json, to be "
        f"removed from there if its numbers are plain): {DEQUANTIZE}"
    )
    refused_in_a_merge(folder, f"^{re.escape(message)}$")


FILES: list[tuple[str, Any]] = [
    ("hf_quant_config.json", {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}),
    ("hf_quant_config.json", {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}),
    ("quantize_config.json", {"bits": 4, "group_size": 128}),
    ("quant_config.json", {"w_bit": 4}),
]


@pytest.mark.parametrize(("file", "content"), FILES)
def test_quantized_models_are_known_by_files_beside_them(tmp_path: Path, file: str, content: Any) -> None:
    folder = save_safetensors(tmp_path / "model", {"w.weight": torch.rand(4, 4)})
    (folder / file).write_text(json.dumps(content))
    message = (
        f"models must be without quantization, got {folder}, which is quantized ({file} beside it, to be removed if "
        f"its numbers are plain): {DEQUANTIZE}"
    )
    refused_in_a_merge(folder, f"^{re.escape(message)}$")


def test_configs_that_say_that_nothing_is_quantized(tmp_path: Path) -> None:
    config = {"quantization_config": None, "text_config": {"quantization_config": {}}}
    folder = save_safetensors(tmp_path / "model", {"w.weight": torch.rand(4, 4)}, config=config)
    nothing = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": None}}
    (folder / "hf_quant_config.json").write_text(json.dumps(nothing))
    check_plain(open_checkpoint(folder))


@pytest.mark.parametrize("case", FACTORS)
def test_factors_are_no_weights(tmp_path: Path, case: str) -> None:
    folder = save_safetensors(tmp_path / "model", {**FACTORS[case], "norm.weight": torch.rand(4)})
    message = (
        rf"^models must have weights, got {re.escape(str(folder))} with factors of low rank \(\w+: "
        rf"'({'|'.join(map(re.escape, FACTORS[case]))})'\): merge them into their model first, or name an "
        rf"adapter of PEFT as model\+adapter$"
    )
    with pytest.raises(ValueError, match=message):
        check_plain(open_checkpoint(folder))


def test_what_only_looks_like_it_is_merged(tmp_path: Path) -> None:
    folder = save_safetensors(tmp_path / "model", PLAIN)
    check_plain(open_checkpoint(folder))
    merge(merge_of(folder), tmp_path / "out")


def test_gguf(tmp_path: Path) -> None:
    for name in ("a.gguf", "a.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"GGUF" + bytes(99))
        refused(path, f"models must be without quantization, got {path} in the format GGUF: {DEQUANTIZE}")


def test_a_folder_of_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(99))
    with pytest.raises(FileNotFoundError, match=f"got GGUF, which is quantized: {DEQUANTIZE}$"):
        open_checkpoint(tmp_path)


def test_dtypes_of_less_than_8_bits(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, 4)
    said = "what torch has not is mostly quantized, dequantize it first"
    refused(path, f"{path} must hold tensors of dtypes that torch has, got F4 for 'a': {said}")
