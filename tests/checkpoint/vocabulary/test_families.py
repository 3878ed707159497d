"""Rows follow tokens in every family that transformers has: it says which they are, and loads the result."""

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
from surgery_kernels.checkpoint.vocabulary.sizes import numbers_in
from tests.cases import assert_same
from tests.checkpoints import save_safetensors
from tests.llama_checkpoints import loaded

pytestmark = [pytest.mark.any_isa, pytest.mark.filterwarnings("ignore::UserWarning")]
transformers = pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

BASE_ROWS, EXPERT_ROWS, PER_LAYER, NUM_TOKENS = 39, 35, 37, 33
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 20, "head_dim": 8,
}  # fmt: skip
BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20,
}  # fmt: skip
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 20, "n_ctx": 20, "n_inner": 24}
VISION = {**SIZES, "image_size": 8, "patch_size": 4, "projection_dim": 10}
# what a configuration holds, by the class of the model
FAMILIES: dict[str, dict[str, Any]] = {
    "AlbertForMaskedLM": {**SIZES, "embedding_size": 12},
    "BartForConditionalGeneration": BART,
    "BertForMaskedLM": SIZES,
    "BlenderbotForConditionalGeneration": BART,
    "BloomForCausalLM": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
    "CLIPModel": {"text_config": VISION, "vision_config": VISION, "projection_dim": 10},
    "CLIPTextModelWithProjection": VISION,
    "CohereForCausalLM": SIZES,
    "CTRLLMHeadModel": {**GPT2, "dff": 24},
    "DebertaV2ForMaskedLM": SIZES,
    "DistilBertForMaskedLM": {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 20},
    "ElectraForMaskedLM": {**SIZES, "embedding_size": 12},
    "FalconForCausalLM": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    "Gemma2ForCausalLM": SIZES,
    "Gemma3nForCausalLM": {
        **SIZES,
        "vocab_size_per_layer_input": PER_LAYER,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "intermediate_size": [24],
        "layer_types": ["full_attention"],
    },
    "GPT2LMHeadModel": GPT2,
    "GPTJForCausalLM": {**GPT2, "rotary_dim": 4},
    "GPTNeoXForCausalLM": SIZES,
    "LlamaForCausalLM": SIZES,
    "LlavaForConditionalGeneration": {
        "text_config": {"model_type": "llama", **SIZES},
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "image_token_index": 32,
    },
    "MambaForCausalLM": {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
    "MarianMTModel": BART,
    "MobileBertForMaskedLM": {
        **SIZES,
        "embedding_size": 12,
        "intra_bottleneck_size": 16,
        "true_hidden_size": 16,
        "num_feedforward_networks": 1,
    },
    "ModernBertForMaskedLM": SIZES,
    "MptForCausalLM": {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 20},
    "Olmo2ForCausalLM": SIZES,
    "OPTForCausalLM": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "PhiForCausalLM": SIZES,
    "Qwen2ForCausalLM": SIZES,
    "Qwen2VLForConditionalGeneration": {
        "text_config": {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 1, "embed_dim": 8, "hidden_size": 16, "num_heads": 2, "patch_size": 2},
    },
    "Qwen3ForCausalLM": SIZES,
    "RobertaForMaskedLM": SIZES,
    "RwkvForCausalLM": {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 2, "context_length": 20},
    "T5ForConditionalGeneration": T5,
    "WhisperForConditionalGeneration": {
        **BART,
        "num_mel_bins": 6,
        "max_source_positions": 10,
        "max_target_positions": 20,
    },
    "XLMWithLMHeadModel": {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "max_position_embeddings": 20},
    "XLNetLMHeadModel": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24},
}
IDS = {f"{kind}_token_id": 0 for kind in ("pad", "bos", "eos", "cls", "sep", "decoder_start")}


def configuration(name: str, num_rows: int) -> Any:
    given, kind = FAMILIES[name], getattr(transformers, name).config_class
    if "text_config" in given:
        return kind(**{**given, "text_config": {**given["text_config"], "vocab_size": num_rows, **IDS}})
    return kind(vocab_size=num_rows, **{**given, **IDS})


def save(folder: Path, name: str, num_rows: int, tokens: Mapping[str, int]) -> dict[str, Tensor]:
    model = getattr(transformers, name)(configuration(name, num_rows))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("final_logits_bias"):
            torch.nn.init.normal_(buffer)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": tokens, "merges": []}}))
    return loaded(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_follow_tokens(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    order = torch.randperm(NUM_TOKENS)
    base = save(tmp_path / "base", name, BASE_ROWS, {f"t{i}": i for i in range(NUM_TOKENS)})
    expert = save(tmp_path / "expert", name, EXPERT_ROWS, {f"t{i}": row for i, row in enumerate(order.tolist())})
    listed = [{"model": str(tmp_path / of), "parameters": {"weight": 0.5}} for of in ("base", "expert")]
    merge({"merge_method": "linear", "models": listed, "tokenizer_source": "base"}, tmp_path / "out")
    result = loaded(tmp_path / "out")
    assert result.keys() == base.keys()
    for key, tensor in result.items():
        ours, theirs = base[key], expert[key]
        for axis in range(ours.dim()):
            if (ours.shape[axis], theirs.shape[axis]) in ((BASE_ROWS, EXPERT_ROWS), (PER_LAYER, PER_LAYER)):
                ours, theirs = ours.narrow(axis, 0, NUM_TOKENS), theirs.index_select(axis, order)
        assert_same(tensor, 0.5 * ours + 0.5 * theirs if ours.is_floating_point() else ours, key)
    model, loading = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["mismatched_keys"] and not loading["unexpected_keys"], loading
    assert model.config.get_text_config().vocab_size == NUM_TOKENS


def layers(*shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape for name in ("model.layers.0.attention.wqkv", "model.layers.0.feed_forward.w1")}


R, H = BASE_ROWS, 16
# by name: the configuration, the tensors with a row for every token, and others
OTHERS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "InternLM2": ({"vocab_size": R}, {"model.tok_embeddings.weight": (R, H), "output.weight": (R, H)}, layers(24, H)),
    "ChatGLM": (
        {"padded_vocab_size": R, "hidden_size": H},
        {"transformer.embedding.word_embeddings.weight": (R, H), "transformer.output_layer.weight": (R, H)},
        {"transformer.encoder.layers.0.mlp.dense_4h_to_h.weight": (H, R), "transformer.final_layernorm.weight": (H,)},
    ),
    "OLMo": (
        {"vocab_size": 30, "embedding_size": R, "n_layers": 1},
        {"model.transformer.wte.weight": (R, H), "model.transformer.ff_out.weight": (R, H)},
        {"model.transformer.blocks.0.ff_out.weight": (H, R), "model.transformer.blocks.0.ff_proj.weight": (R, H)},
    ),
    "RWKV": (
        {},
        {"emb.weight": (R, H), "head.weight": (R, H)},
        {"blocks.0.ffn.key.weight": (H, H), "ln_out.weight": (H,)},
    ),
    "open_clip": (
        {"vocab_size": R, "embed_dim": 12},
        {"token_embedding.weight": (R, H)},
        {
            "text_projection": (H, 12),
            "positional_embedding": (20, H),
            "transformer.resblocks.0.mlp.c_fc.weight": (24, H),
        },
    ),
    "several tokens ahead": (
        {"text_config": {"vocab_size": R}},
        {
            "model.embed_tokens.weight": (R, H),
            "lm_head.weight": (R, H),
            "model.layers.3.embed_tokens.weight": (R, H),
            "model.layers.3.shared_head.head.weight": (R, H),
        },
        {"model.layers.3.eh_proj.weight": (H, 2 * H)},
    ),
    "a component": (
        {},
        {"text_encoder/text_model.embeddings.token_embedding.weight": (R, H)},
        {"unet/conv_in.weight": (4,)},
    ),
}


def plain(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], order: Any
) -> dict[str, Tensor]:
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_safetensors(folder, tensors, config={"model_type": "toy", **config})
    tokens = {f"t{i}": row for i, row in enumerate(order.tolist())}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": tokens, "merges": []}}))
    return tensors


def by_token(folder: Path) -> dict[str, Any]:
    listed = [{"model": str(folder / of), "parameters": {"weight": 0.5}} for of in ("base", "expert")]
    return {"merge_method": "linear", "models": listed, "tokenizer_source": "base"}


@pytest.mark.parametrize("name", OTHERS)
def test_families_of_others(tmp_path: Path, name: str) -> None:
    config, of_tokens, others = OTHERS[name]
    order = torch.randperm(NUM_TOKENS)
    base = plain(tmp_path / "base", config, {**of_tokens, **others}, torch.arange(NUM_TOKENS))
    expert = plain(tmp_path / "expert", config, {**of_tokens, **others}, order)
    merge(by_token(tmp_path), tmp_path / "out")
    for key, tensor in loaded(tmp_path / "out").items():
        rows = (slice(NUM_TOKENS), order) if key in of_tokens else (..., ...)
        assert_same(tensor, 0.5 * base[key][rows[0]] + 0.5 * expert[key][rows[1]], key)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    sizes = {value for _, value in numbers_in(written)}
    assert NUM_TOKENS in sizes and R not in sizes


@pytest.mark.parametrize(
    ("name", "shape", "config"),
    [
        ("model.bag_of_words.weight", (R, H), {}),
        ("model.bag_of_words.bias", (R,), {}),
        ("model.turned.weight", (H, R), {}),
        ("model.layers.0.ngrams.weight", (R, 24), {}),
        ("lm_head.weight", (R + 1, H), {}),
        ("mtp.embed_tokens.weight", (R - 1, H), {"hidden_size": H}),
    ],
)
def test_what_may_be_of_tokens_is_refused_by_name(
    tmp_path: Path, name: str, shape: tuple[int, ...], config: dict[str, Any]
) -> None:
    shapes = {"model.embed_tokens.weight": (R, H), name: shape, "model.layers.0.mlp.weight": (24, H)}
    for num_tokens, order in ((NUM_TOKENS, None), (R, torch.randperm(R))):  # fewer rows, and other ones
        same = torch.arange(num_tokens)
        plain(tmp_path / "base", {"vocab_size": R, **config}, shapes, same)
        plain(tmp_path / "expert", {"vocab_size": R, **config}, shapes, same if order is None else order)
        message = (
            f"{name!r} of {tmp_path / 'base'} must be known to have a row for every token, or not, for a merge by "
            f"token, got shape {list(shape)} where the vocabulary has {R} rows"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            merge(by_token(tmp_path), tmp_path / "out")
    plain(tmp_path / "expert", {"vocab_size": R, **config}, shapes, torch.arange(R))
    merge(by_token(tmp_path), tmp_path / "out")  # where no row moves there is nothing to know


def test_rows_in_two_tensors_are_refused(tmp_path: Path) -> None:
    """Llama 3.2 Vision has eight rows more than its head, Idefics those of its own tokens in a tensor of their own."""
    shapes = {"embed_tokens.weight": (R + 8, H), "lm_head.weight": (R, H)}
    plain(tmp_path / "base", {"text_config": {"vocab_size": R}}, shapes, torch.arange(R))
    plain(tmp_path / "expert", {"text_config": {"vocab_size": R}}, shapes, torch.arange(R))
    with pytest.raises(ValueError, match="^'lm_head.weight' of .* must be known to have a row for every token"):
        merge(by_token(tmp_path), tmp_path / "out")
    shapes = {"embed_tokens.weight": (R, H), "embed_tokens.additional_embedding.weight": (2, H)}
    for of in ("base", "expert"):
        plain(tmp_path / of, {"vocab_size": R, "additional_vocab_size": 2}, shapes, torch.arange(R + 2))
    with pytest.raises(ValueError, match="^'embed_tokens.additional_embedding.weight' of .* must be known"):
        merge(by_token(tmp_path), tmp_path / "out")


def test_a_length_that_is_another_too_is_not_of_tokens(tmp_path: Path) -> None:
    config = {"vocab_size": R, "max_position_embeddings": R, "hidden_size": H}
    shapes = {"wte.weight": (R, H), "wpe.weight": (R, H), "h.0.mlp.weight": (24, H)}
    order = torch.randperm(NUM_TOKENS)
    base = plain(tmp_path / "base", config, shapes, torch.arange(NUM_TOKENS))
    expert = plain(tmp_path / "expert", config, shapes, order)
    merge(by_token(tmp_path), tmp_path / "out")
    assert_same(loaded(tmp_path / "out")["wpe.weight"], 0.5 * base["wpe.weight"] + 0.5 * expert["wpe.weight"])


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        ({"blocks.0.weight": (8, 8)}, {}),
        ({"input_embedding.weight": (R + 8, H), "lm_head.weight": (R, H)}, {"vocab_size": R}),  # CPM-Ant's prompts
    ],
)
def test_a_model_without_an_embedding(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], config: dict[str, Any]
) -> None:
    plain(tmp_path / "base", config, shapes, torch.arange(4))
    plain(tmp_path / "expert", config, shapes, torch.tensor([1, 0, 2, 3]))
    message = f"{tmp_path / 'base'} must have an embedding of its tokens for a merge by token, got none"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge(by_token(tmp_path), tmp_path / "out")
