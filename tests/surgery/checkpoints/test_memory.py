"""Peak memory of calibrations from disk to disk."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

from transformers import LlamaConfig

from tests.surgery.checkpoints.language import VOCABULARY, family, texts_of, write_data

pytestmark = pytest.mark.any_isa

DIM, HIDDEN = 256, 512
BLOCK_BYTES = 4 * (4 * DIM * DIM + 3 * DIM * HIDDEN + 2 * DIM)


def models_of(folder: Path, num_layers: int) -> Path:
    folder.mkdir()
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    recipe = family(folder, config)
    (folder / "recipe.yml").write_text(json.dumps(recipe))  # JSON is YAML
    write_data(folder / "data.jsonl", recipe, [texts_of(number, 4) for number in range(2)])
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_peak(run_python: Callable[..., str], tmp_path: Path) -> None:
    """It follows from the size of a block, and not from how many there are."""
    few, many = 2, 14
    folders = [str(models_of(tmp_path / f"{number}", number)) for number in (few, many)]
    of_few, beyond = json.loads(run_python("-m", "tests.surgery.checkpoints.calibration_memory", *folders))
    assert of_few + beyond < 40 * BLOCK_BYTES
    # less than any one of the models has in the further layers; not nothing, for free memory lies in pieces
    assert beyond < (many - few) * BLOCK_BYTES * 2 / 3
