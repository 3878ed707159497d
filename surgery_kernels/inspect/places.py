"""Where in a model a tensor lies, for tables by layer and by kind."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..merging.depths import LAYER

# The first that is found in a name decides; names of transformers, timm, open_clip, diffusers.
KINDS: Mapping[str, str] = {
    "router": r"\.(gate|router)\.(weight|wg)|\.router\b|mlp\.gate\.weight",
    "norm": r"norm|\bln_|\.ln\d?\.|layer_?norm|\.bn\d?\.",
    "attention": r"attn|attention|[qkv]_proj|o_proj|\bc_attn|in_proj|to_[qkv]\b|to_out",
    "MLP": r"mlp|ffn|feed_forward|experts|fc\d?\b|c_fc|w[123]\b|intermediate|output\.dense|up_proj|down_proj",
    "head": r"lm_head|classifier|head\b|score\b|logit_scale|text_projection|visual_projection|pooler",
    "embedding": r"embed|wte|wpe|tok_|class_token|cls_token|pos_|conv_proj|patch",
}
OTHER = "other"


def layer_of(name: str) -> int | None:
    """The number of its layer, None outside of all."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def kind_of(name: str) -> str:
    """One of KINDS, or OTHER."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHER)
