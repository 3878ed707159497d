"""The command `calibrate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from surgery_kernels.cli import main

pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)

from tests.surgery.checkpoints.language import family, llama, write_data

pytestmark = pytest.mark.any_isa


def test_it_says_what_it_does_and_prints_perplexities(tmp_path: Path) -> None:
    recipe = family(tmp_path, llama())
    data = write_data(tmp_path / "data.jsonl", recipe)
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    arguments = ["calibrate", str(tmp_path / "recipe.yml"), str(data), str(tmp_path / "out"), "--residual"]
    result = CliRunner().invoke(main, [*arguments, "--dry-run"])
    assert result.exit_code == 0 and not (tmp_path / "out").exists(), result.output
    first, second = (model["model"] for model in recipe["models"])
    assert f"6 of {first}, 54 tokens with padding" in result.output
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    assert ["perplexity", "before", "after", "expert"] in lines
    card = (tmp_path / "out" / "README.md").read_text()
    for expert in (first, second):
        (cells,) = [line[1:] for line in lines if line[:1] == [expert] and len(line) == 4]
        assert f"| {expert} | {' | '.join(cells)} |" in card
    assert (tmp_path / "out" / "model.safetensors").exists()
    result = CliRunner().invoke(main, arguments)
    assert (
        result.exit_code == 2
        and result.stderr == f"surgery-kernels: out must not exist, got '{tmp_path / 'out'}' (manual: surgery)\n"
    )
    result = CliRunner().invoke(main, [*arguments[:3], str(tmp_path / "other"), "--teacher", "2"])
    assert (
        result.exit_code == 2
        and result.stderr == "surgery-kernels: teacher must be in [0, 1], got 2.0 (manual: surgery)\n"
    )
