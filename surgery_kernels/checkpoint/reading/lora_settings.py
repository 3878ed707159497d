"""The adapter_config.json of a LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_json

ADAPTER_CONFIG = "adapter_config.json"

# Options of PEFT under which the result is more than a product added to a weight, or the product is another.
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "mica",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # the others start by changing the base


@dataclass(frozen=True)
class LoraSettings:
    """What scales the product of each module, and the layout of its weight."""

    path: Path
    rank: Any  # as the file has them: checked when a module asks
    scale: Any  # PEFT's lora_alpha
    rank_pattern: Mapping[str, Any]
    scale_pattern: Mapping[str, Any]
    rank_stabilized: bool
    fan_in_fan_out: bool
    dora: bool
    base: str | None  # what it was trained on, by its own words
    saved: tuple[str, ...]  # modules_to_save
    target_parameters: tuple[str, ...]
    keeps_ties: bool  # ensure_weight_tying
    tokens: Any  # trainable_token_indices

    @classmethod
    def read(cls, path: Path) -> LoraSettings:
        """Raises ValueError for what is not a plain LoRA."""
        options = read_json(path)
        if options.get("peft_type") != "LORA":
            raise ValueError(f"{path} must have the peft_type 'LORA', got {options.get('peft_type')!r}")
        for option in UNSUPPORTED:
            if options.get(option):
                raise ValueError(f"{path} must be of a plain LoRA, got {option}={options[option]!r}")
        initial = options.get("init_lora_weights", True)
        if initial not in INITIAL:
            raise ValueError(
                f"{path} must be of a LoRA that leaves its base as it is, got init_lora_weights={initial!r}: save it "
                f"with path_initial_model_for_weight_conversion"
            )
        patterns = [options.get(name) or {} for name in ("rank_pattern", "alpha_pattern")]
        if not all(isinstance(pattern, dict) for pattern in patterns):
            raise ValueError(f"{path} must have rank_pattern and alpha_pattern by module, got {patterns}")
        return cls(
            path=path,
            rank=options.get("r", 8),
            scale=options.get("lora_alpha", 8),
            rank_pattern=patterns[0],
            scale_pattern=patterns[1],
            rank_stabilized=bool(options.get("use_rslora")),
            dora=bool(options.get("use_dora")),
            fan_in_fan_out=bool(options.get("fan_in_fan_out")),
            base=options.get("base_model_name_or_path"),
            saved=tuple(options.get("modules_to_save") or ()),
            target_parameters=tuple(options.get("target_parameters") or ()),
            keeps_ties=bool(options.get("ensure_weight_tying")),
            tokens=options.get("trainable_token_indices") or {},
        )

    def scaling(self, module: str, rank: int) -> float:
        """``lora_alpha / rank``, or over its root with use_rslora; `rank` is what the tensors of the module have."""
        configured = self._of_module(module, self.rank_pattern, self.rank)
        if configured != rank:
            raise ValueError(f"{self.path} must have the rank of {module!r}, {rank}, got {configured}")
        scale = self._of_module(module, self.scale_pattern, self.scale)
        if not isinstance(scale, (int, float)) or not math.isfinite(scale):
            raise ValueError(f"{self.path} must have a finite lora_alpha for {module!r}, got {scale!r}")
        return scale / (math.sqrt(rank) if self.rank_stabilized else rank)

    def saves(self, module: str) -> bool:
        """Whether it is one of modules_to_save, by the end of its name or of that of a module around it."""
        return any(f".{name}." in f".{module}." for name in self.saved)

    def parameters_of(self, module: str) -> list[str]:
        """The names in target_parameters of parameters that the module may have itself."""
        pairs = (target.rpartition(".") for target in self.target_parameters)
        return [parameter for owner, _, parameter in pairs if f".{module}".endswith(f".{owner}") or not owner]

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The rows of an embedding in trainable_token_indices, which names the embedding or has one list for all."""
        if not isinstance(self.tokens, Mapping):
            return tuple(self.tokens)
        return next((tuple(at) for name, at in self.tokens.items() if f".{module}".endswith(f".{name}")), ())

    def _of_module(self, module: str, patterns: Mapping[str, Any], default: Any) -> Any:
        """That of the first pattern that fits the end of the name, as in PEFT."""
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error:
                raise ValueError(
                    f"{self.path} must have regular expressions as patterns of modules, got {pattern!r}"
                ) from None
        return default
