"""Tiny encoders of every kind that surgery must fit: our own, Hugging Face's, timm's, open_clip's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16
NUM_FEATURES = 12
BATCH = 6
SMALL = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


class Mixer(nn.Module):
    """A block whose tokens see each other; may return a tuple, and tokens in either order."""

    def __init__(self, width: int, output: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.token_dim = 1
        self.output = output

    def forward(self, tokens: Any) -> Any:
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        mixed = tokens + torch.tanh(self.linear(tokens)) + tokens.mean(self.token_dim, keepdim=True)
        return self.output(mixed)


class Encoder(nn.Module):
    """Samples [batch, tokens, 3] -> features [batch, num_features]."""

    def __init__(
        self,
        depth: int = 2,
        width: int = WIDTH,
        num_features: int = NUM_FEATURES,
        output: Callable[[Tensor], Any] = lambda tokens: tokens,
        token_major: bool = False,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.blocks = nn.ModuleList(Mixer(width, output) for _ in range(depth))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, num_features)
        self.token_major = token_major
        for block in self.blocks:
            block.token_dim = 0 if token_major else 1

    def forward(self, samples: Tensor) -> Tensor:
        tokens = self.embed(samples)
        if self.token_major:
            tokens = tokens.transpose(0, 1).contiguous()
        for block in self.blocks:
            tokens = block(tokens)
        tokens = tokens[0] if isinstance(tokens, tuple) else tokens
        return self.head(self.dropout(tokens[0] if self.token_major else tokens[:, 0]))


@dataclass(frozen=True)
class Case:
    """A model in evaluation mode, inputs for it, and what surgery must find in it."""

    model: nn.Module
    inputs: Tensor | dict[str, Tensor]
    blocks: tuple[str, ...]
    num_features: int
    representation: Callable[[Any], Tensor] = lambda output: output


def samples(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def perturbed(model: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """A copy with other parameters: an expert."""
    generator = torch.Generator().manual_seed(seed)
    expert = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in expert.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))
    return expert


def own() -> Case:
    return Case(Encoder(), samples(BATCH, 5, 3), ("blocks.0", "blocks.1"), NUM_FEATURES)


def own_with_tuples() -> Case:
    model = Encoder(output=lambda tokens: (tokens, "weights"))
    return Case(model, samples(BATCH, 5, 3), ("blocks.0", "blocks.1"), NUM_FEATURES)


def own_token_major() -> Case:
    return Case(Encoder(token_major=True), samples(BATCH, 5, 3), ("blocks.0", "blocks.1"), NUM_FEATURES)


def clip() -> Case:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=NUM_FEATURES, **SMALL)
    blocks = ("vision_model.encoder.layers.0", "vision_model.encoder.layers.1")
    model = CLIPVisionModelWithProjection(config)
    return Case(model, samples(BATCH, 3, 8, 8), blocks, NUM_FEATURES, lambda output: output.image_embeds)


def vit() -> Case:
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(image_size=8, patch_size=4, **SMALL))
    return Case(model, samples(BATCH, 3, 8, 8), ("layers.0", "layers.1"), WIDTH, lambda output: output.pooler_output)


def vit_without_pooler() -> Case:
    pooled = vit()
    pooled.model.pooler = None
    return replace(pooled, representation=lambda output: output.last_hidden_state[:, 0])


def bert() -> Case:
    from transformers import BertConfig, BertModel

    ids = torch.randint(0, 50, (BATCH, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    model = BertModel(BertConfig(vocab_size=50, **SMALL))
    inputs = {"input_ids": ids, "attention_mask": mask}
    return Case(model, inputs, ("encoder.layer.0", "encoder.layer.1"), WIDTH, lambda output: output.pooler_output)


def timm() -> Case:
    from timm.models import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=0)
    return Case(model, samples(BATCH, 3, 8, 8), ("blocks.0", "blocks.1"), WIDTH)


def open_clip() -> Case:
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(image_size=8, patch_size=4, width=WIDTH, layers=2, heads=2, mlp_ratio=2, output_dim=12)
    blocks = ("transformer.resblocks.0", "transformer.resblocks.1")
    return Case(model, samples(BATCH, 3, 8, 8), blocks, NUM_FEATURES)


def open_clip_token_major() -> Case:
    batch_first = open_clip()
    from open_clip.transformer import Transformer

    transformer = Transformer(width=WIDTH, layers=2, heads=2, mlp_ratio=2, batch_first=False)
    transformer.load_state_dict(batch_first.model.transformer.state_dict())
    batch_first.model.transformer = transformer
    return batch_first


CASES = [
    own, own_with_tuples, own_token_major, clip, vit, vit_without_pooler, bert, timm, open_clip, open_clip_token_major,
]  # fmt: skip


def made(case: Callable[[], Case]) -> Case:
    """One of CASES in evaluation mode, with the same parameters in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        result = case()
    result.model.eval()
    return result


def ragged(on_the_left: bool, pad: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Token batches padded to the longest of all, and the same cut to their own longest."""
    lengths = torch.tensor([3, 2, 5, 4, 1, 2])
    places = torch.arange(5).flip(0) if on_the_left else torch.arange(5)
    mask = (places < lengths[:, None]).long()
    ids = torch.randint(5, 50, (6, 5), generator=torch.Generator().manual_seed(1))
    together = {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}
    own = []
    for rows in torch.arange(6).split(2):
        longest = int(lengths[rows].max())
        cut = slice(5 - longest, 5) if on_the_left else slice(0, longest)
        own.append({name: x[rows, cut] for name, x in together.items()})
    return together, own
