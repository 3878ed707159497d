"""Peak memory of merges by token."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_zeros

pytestmark = pytest.mark.any_isa

MIB = 1 << 20
NUM_ROWS, NUM_COLUMNS = 24576, 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
def test_peak(run_python: Callable[..., str], tmp_path: Path) -> None:
    """No model's rows are where another has them, and each has some of its own."""
    folders = [tmp_path / f"model{i}" for i in range(6)]
    for i, (path, step) in enumerate(zip(folders, (1, 5, 7, 11, 13, 17), strict=True)):
        path.mkdir()
        shapes = {"embed_tokens.weight": (NUM_ROWS, NUM_COLUMNS)}
        write_zeros(path / "model.safetensors", shapes, torch.bfloat16)
        tokens = {f"token {row * step % NUM_ROWS + 9 * i}": row for row in range(NUM_ROWS)}
        (path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": tokens, "merges": []}}))
    listed = [{"model": str(path), "parameters": {"weight": 0.2}} for path in folders]
    given = {"merge_method": "linear", "base_model": str(folders[0]), "models": listed, "tokenizer_source": "union"}
    (tmp_path / "recipe.yml").write_text(json.dumps(given))
    nbytes = NUM_ROWS * NUM_COLUMNS * 2
    assert len(folders) * nbytes > 1024 * MIB
    peak = int(run_python("-m", "tests.merge_memory", str(tmp_path / "recipe.yml"), str(tmp_path / "out")))
    shutil.rmtree(tmp_path / "out")
    assert peak < 1024 * MIB + 2 * nbytes
