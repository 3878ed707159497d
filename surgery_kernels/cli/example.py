"""surgery-kernels example."""

from __future__ import annotations

import json
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from .exits import errors_as_exit_codes

WIDTH, LAYERS = 32, 2
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
RECIPE = """\
merge_method: ties
base_model: {0}/base
models:
  - model: {0}/poet
    parameters: {{density: 0.2, weight: 1}}
  - model: {0}/clerk
    parameters: {{density: 0.2, weight: 1}}
dtype: bfloat16
"""


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def example(folder: Path) -> None:
    """Write a base, two experts and a recipe for them into the new folder FOLDER: 0.1 MB, to try things with."""
    with errors_as_exit_codes():
        if folder.exists():
            raise ValueError(f"folder must be new, got {folder}, which exists")
        generator = torch.Generator().manual_seed(0)
        base = _model(generator, 0.02)
        for name in ("base", "poet", "clerk"):
            change = {key: 0 if name == "base" else x for key, x in _model(generator, 0.002).items()}
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": WIDTH}))
            state = {key: (x + change[key]).bfloat16() for key, x in base.items()}
            save_file(state, folder / name / "model.safetensors", {"format": "pt"})
        (folder / "ties.yml").write_text(RECIPE.format(folder))
    click.echo(f"wrote {folder}/ties.yml and its models: surgery-kernels merge {folder}/ties.yml {folder}/merged")


def _model(generator: torch.Generator, scale: float) -> dict[str, Tensor]:
    names = [f"model.layers.{layer}.{matrix}.weight" for layer in range(LAYERS) for matrix in MATRICES]
    return {name: scale * torch.randn(WIDTH, WIDTH, generator=generator) for name in names}
