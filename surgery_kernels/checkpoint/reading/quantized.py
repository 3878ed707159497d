"""Numbers that are not weights: quantized ones, which need what lies beside them, and factors of low rank.

Merged one by one they would come out as garbage in files that look right. They are told by their names and dtypes,
whatever a config.json says, and by a config.json, whatever the tensors are called.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from .files import read_json
from .source import Source, TensorInfo

INTEGERS = frozenset((torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32))
ANY = frozenset[torch.dtype]()


@dataclass(frozen=True)
class Mark:
    """Names of tensors that give away how the numbers of a model are stored."""

    format: str  # in words
    end: str  # regular expression: the end of the name, from a dot on
    dtypes: frozenset[torch.dtype] = ANY  # which the tensor must have
    beside: str = ""  # regular expression: how another tensor of the same module goes on behind its name

    def fits(self, name: str, info: TensorInfo, ends: Mapping[str, set[str]]) -> bool:
        if self.dtypes and info.dtype not in self.dtypes:
            return False
        return not self.beside or any(re.fullmatch(self.beside, end) for end in ends[name.rpartition(".")[0]])


SCALE = r"(scales?(_inv|_2|_ub)?|global_scale|zero_point)"

QUANTIZED = (
    Mark("bitsandbytes", r"(nested_)?(absmax|quant_map)|quant_state\.bitsandbytes__\w+|SCB|weight_format"),
    Mark("GPTQ or AWQ", r"qweight|qzeros|g_idx", INTEGERS),
    Mark("MXFP4", r"\w+_blocks", INTEGERS, r"\w+_scales"),
    Mark("AQLM", r"codes", INTEGERS, r"codebooks"),
    Mark("VPTQ", r"indices", INTEGERS, r"centroids\.weight"),
    Mark("HQQ", r"W_q"),
    Mark("EXL2 or EXL3", r"q_weight|trellis|suh|svh", INTEGERS),
    Mark("QuIP#", r"Qidxs"),
    Mark("SpQR", r"dense_weights"),
    Mark("Marlin", r"B", INTEGERS, r"s"),
    Mark("ComfyUI's", r"scaled_fp8|comfy_quant|weight_scalar"),
    Mark("SVDQuant", r"wscales|wtscale|wcscales|smooth_factor"),
    Mark("quanto or torchao", r"weight[.:]_?(data|scale|shift|qdata|zero_point)|_weight_(qdata|scale|zero_point)"),
    Mark("ModelOpt or Quark", r"pre_quant_scale|(weight|input|output)_quantizer\.\w+"),
    Mark("TensorRT-LLM", r"(weights|activation|prequant)_scaling_factor|per_channel_scale"),
    Mark("compressed-tensors", r"weight_packed|weight_shape|weight_g_idx|scale_packed|compressed|bitmask"),
    Mark("scaled", rf"(weight|input|kv)_{SCALE}|q?scale_(weight|input|act)|weight\.(q?scales?|scale_inv)|v_scale"),
    Mark("scaled", rf"((gate_up|gate|up|down)_(proj|exps)|w[123])(_weight|_input)?_{SCALE}"),
    Mark("scales", r"\w+", frozenset({torch.float8_e8m0fnu})),
    Mark("integers", r"(\w+[._])?weights?|(gate_up|gate|up|down)_proj|w[123]", INTEGERS),
)
# Of 8 bits, whatever a scale beside them is called; without one they are plain numbers, cast to few bits.
EIGHT_BITS = {
    torch.int8,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
}
SCALE_IN_NAME = re.compile(r"(?<!logit_)(?<!layer_)(scale|amax|SCB)")

FACTORS = (
    Mark("LoRA", r"lora_(A|B|E|embedding_A|embedding_B|up|down|mid|magnitude_vector)(\.[\w-]+){0,2}"),
    Mark("LoRA", r"\w*lora\w*\.(up|down)\.weight|dora_scale"),
    Mark("LoHa", r"hada_(w[12]_[ab]|t[12])(\.[\w-]+)?"),
    Mark("LoKr", r"lokr_(w[12](_[ab])?|t[12])(\.[\w-]+)?"),
    Mark("OFT", r"oft_(blocks|diag|[rRsS])(\.[\w-]+){0,2}|boft_\w+(\.[\w-]+){0,2}"),
    Mark("IA3", r"ia3_l(\.[\w-]+)?|on_input"),
    Mark("VeRA", r"vera_(lambda_[bd]|[AB])(\.[\w-]+)?"),
)
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
CONFIG_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")


def check_plain(source: Source) -> None:
    """Raises ValueError for a model whose tensors are no weights, before anybody compares or merges them."""
    found = next(_marks(source.tensors, FACTORS), None)
    if found:
        format, name = found
        raise ValueError(
            f"models must have weights, got {source.name} with factors of low rank ({format}: {name!r}): merge them "
            f"into their model first, or name an adapter of PEFT as model+adapter"
        )
    if evidence := _evidence(source):
        raise ValueError(
            f"models must be without quantization, got {source.name}, which is quantized ({evidence}): dequantize it "
            f"first, or take the model it was made from"
        )


def check_file(path: Path) -> None:
    """Raises ValueError for a file of a format that is made for quantized numbers."""
    with open(path, "rb") as file:
        if file.read(4) == b"GGUF":
            raise ValueError(
                f"models must be without quantization, got {path} in the format GGUF: dequantize it first, or take "
                f"the model it was made from"
            )


def _evidence(source: Source) -> str:
    for format, name in chain(_marks(source.tensors, QUANTIZED), _scaled(source.tensors)):
        return f"{format}: {name!r} in {str(source.tensors[name].dtype).removeprefix('torch.')}"
    if key := _key_in(source.config or {}):
        return f"{key} in its config.json, to be removed from there if its numbers are plain"
    for path in (source.folder / file for file in CONFIG_FILES) if source.folder else ():
        if path.is_file() and _says_so(read_json(path)):
            return f"{path.name} beside it, to be removed if its numbers are plain"
    return ""


def _marks(tensors: Mapping[str, TensorInfo], marks: tuple[Mark, ...]) -> Iterator[tuple[str, str]]:
    """Format and name of every tensor that has a mark."""
    ends: dict[str, set[str]] = {}
    for name in tensors:
        module, _, end = name.rpartition(".")
        above, _, middle = module.rpartition(".")
        ends.setdefault(module, set()).add(end)
        ends.setdefault(above, set()).add(f"{middle}.{end}")
    for name, info in tensors.items():
        for mark in _marks_of(".".join(name.rsplit(".", 3)[-3:]), marks):
            if mark.fits(name, info, ends):
                yield mark.format, name


def _scaled(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """Tensors of 8 bits with a scale that is called like them or their module, and something before or behind that."""
    parts: set[str] = set()
    for name in filter(SCALE_IN_NAME.search, tensors):
        cuts = [found.start() for found in re.finditer(r"[._:]", name)]
        parts.update(part for cut in cuts for part in (name[:cut], name[cut + 1 :]))
    for name, info in tensors.items():
        if info.dtype in EIGHT_BITS and (name in parts or name.removesuffix(".weight") in parts):
            yield "8 bits with scales", name


@lru_cache(maxsize=1 << 16)
def _marks_of(end: str, marks: tuple[Mark, ...]) -> tuple[Mark, ...]:
    return tuple(mark for mark in marks if re.search(rf"(^|[./])({mark.end})$", end))


def _key_in(config: Mapping[str, Any]) -> str:
    """The key that says it, in this config or in one inside it."""
    for key, value in config.items():
        if key in CONFIG_KEYS and value:
            return key
        if isinstance(value, dict) and (found := _key_in(value)):
            return f"{key}.{found}"
    return ""


def _says_so(content: Mapping[str, Any]) -> bool:
    """ModelOpt writes its file for models that it has left alone, too."""
    of_modelopt = content.get("quantization")
    if not isinstance(of_modelopt, dict):
        return bool(content)
    return bool(of_modelopt.get("quant_algo") or of_modelopt.get("kv_cache_quant_algo"))
