"""What a configuration says of single layers, for a result whose layers are picked from others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..merging.depths import NUM_LAYERS_KEYS, num_layers
from .vocabulary.sizes import inner_configs

# What the layers of a module are counted by, and in which configurations within that of the model.
TOWER_KEYS = (*NUM_LAYERS_KEYS, "depth", "encoder_layers")
COUNTED_BY = {
    "language": NUM_LAYERS_KEYS,
    "vision": TOWER_KEYS,
    "audio": TOWER_KEYS,
    "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder": ("decoder_layers", "num_decoder_layers"),
}
TOWERS = {"vision": "vis", "audio": "aud"}  # parts of the keys of their configurations

# With one entry for every layer. A string has a letter for each.
BY_LAYER = (
    "activation_sparsity_pattern",
    "attention_layers",
    "block_configs",
    "block_types",
    "ffn_multipliers",
    "hybrid_override_pattern",
    "indexer_types",
    "intermediate_size",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "num_key_value_heads_per_layer",
    "num_kv_heads",
    "num_query_heads",
    "sliding_window",
)
# With the numbers of some layers.
LAYER_NUMBERS = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "global_attention_blocks",
    "hybrid_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "ple_layer_ids",
    "rope_scaling_layers",
)
# What tells layers apart by counting them, which those of a result that takes others do not follow.
COUNTING = (
    "attn_layer_offset",
    "attn_layer_period",
    "attention_types",
    "decoder_sparse_step",
    "expert_layer_period",
    "first_k_dense_replace",
    "full_attention_interval",
    "global_attn_every_n_layers",
    "interleave_moe_layer_step",
    "max_window_layers",
    "moe_layer_freq",
    "moe_layer_frequency",
    "no_rope_layer_interval",
    "num_kv_shared_layers",
    "sliding_window_pattern",
)

# Models whose configuration need not say that every so many layers one attends to everything, the others nearby.
FULL_ATTENTION_EVERY = {
    "cohere2": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "gemma3n": 5,
    "gemma3n_text": 5,
    "gpt_oss": 2,
}


def followed(
    config: Mapping[str, Any], origins: Sequence[tuple[Mapping[str, Any], int]], role: str = "language"
) -> dict[str, Any]:
    """The number of layers and the lists over them for other layers.

    Args:
        config: Of the donor.
        origins: For every layer of the result the configuration of the model it is from, and which it is there.
        role: What kind of layers, of `COUNTED_BY`.

    Returns:
        What changes, in whole configurations within `config` too; nothing where none counts such layers.
    """
    new = _followed(config, origins, COUNTED_BY[role]) if role not in TOWERS else {}
    for key, inner in _inside(config, role).items():
        within = [(_inside(source, role).get(key, source), layer) for source, layer in origins]
        if changed := _followed(inner, within, (*COUNTED_BY[role], *NUM_LAYERS_KEYS)):
            new[key] = {**inner, **changed}
    return new


def _inside(config: Mapping[str, Any], role: str) -> dict[str, Mapping[str, Any]]:
    """The configurations within another that may count layers of that kind."""
    if role == "language":
        return inner_configs(config)
    named = TOWERS.get(role, role)
    return {key: of for key, of in config.items() if named in key and isinstance(of, Mapping)}


def _followed(
    config: Mapping[str, Any], origins: Sequence[tuple[Mapping[str, Any], int]], keys: Sequence[str]
) -> dict[str, Any]:
    there = [key for key in keys if isinstance(config.get(key), int)]
    if not there:
        return {}
    count = config[there[0]]
    new: dict[str, Any] = {key: len(origins) for key in there if config[key] == count}
    entries = [(_counting_alike(source, config), layer) for source, layer in origins]
    if any(layer != place for place, (_, layer) in enumerate(entries)):
        entries = [(_with_types(source), layer) for source, layer in entries]
        config = _with_types(config)
    for name, value in config.items():
        if name in BY_LAYER and isinstance(value, (list, str)) and len(value) == count:
            found = [_entry(source.get(name), value, layer) for source, layer in entries]
            if None not in found:
                new[name] = "".join(found) if isinstance(value, str) else found
        elif name in LAYER_NUMBERS and isinstance(value, list):
            chosen = [layer in source.get(name, value) for source, layer in entries]
            new[name] = [place for place, among_them in enumerate(chosen) if among_them]
    return new


def counts(config: Mapping[str, Any], role: str) -> bool:
    """Whether a configuration says how many layers of that kind there are."""
    return bool(followed(config, [], role))


def uncertain_layers(origins: Sequence[int], config: Mapping[str, Any], role: str = "language") -> list[str]:
    """The keys by which a configuration tells layers apart by counting them, where `origins` counts others."""
    if all(layer == place for place, layer in enumerate(origins)):
        return []
    known = {} if role in TOWERS else dict(config)
    for inner in _inside(config, role).values():
        known |= inner
    if any(key in _with_types(known) for key in ("layer_types", "mlp_layer_types", "layers_block_type")):
        return []
    return [key for key in COUNTING if known.get(key) not in (None, 0, 1)]


def _with_types(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the list that is understood where there is none."""
    count = num_layers(config)
    every = FULL_ATTENTION_EVERY.get(str(config.get("model_type")))
    if config.get("layer_types") or count is None or every is None:
        return config
    every = config.get("sliding_window_pattern") or every
    types = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(count)]
    return {**config, "layer_types": types}


def _counting_alike(other: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of another model, or its inner one, whichever counts layers as `config` does."""
    counts = any(key in other for key in NUM_LAYERS_KEYS if key in config)
    return other if counts else next(iter(inner_configs(other).values()), other)


def _entry(own: Any, donors: Sequence[Any], layer: int) -> Any:
    """Of the model that the layer is from, else of the donor; None where neither says anything."""
    for entries in (own, donors):
        if isinstance(entries, (list, str)) and layer < len(entries):
            return entries[layer]
    return None
