"""Which floating-point tensors are no weights: what a model counts or computes instead of learning it."""

from __future__ import annotations

import re

from .reading.source import TensorInfo

# The ends of their names. A mean of indices is none, one of frequencies or noise schedules fits neither model.
COMPUTED = re.compile(
    r"(^|[./])("
    r"\w*ids|\w*_(index|indices|idx)|num_batches_tracked|"
    r"(\w+_)?inv_freqs?|freqs_(cis|cos|sin)|(cos|sin)_cached|relative_coords_table|"
    r"masked_bias|attn_mask|attention_mask|causal_mask|"
    r"betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod|"
    r"sqrt_recip(m1)?_alphas_cumprod|posterior_(mean_coef[12]|variance|log_variance_clipped)|"
    r"model_ema\.(decay|num_updates)"
    r")$"
)
CAUSAL_MASK = re.compile(r"(^|\.)\w*(attn|attention)\.bias$")  # of GPT-2 and its kin, [1, 1, positions, positions]


def is_computed(name: str, info: TensorInfo) -> bool:
    causal = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
    return bool(COMPUTED.search(name) or (causal and CAUSAL_MASK.search(name)))
