"""Recipes of several documents, beside mergekit's own command for them; stopped, resumed and kept."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from surgery_kernels import cli
from surgery_kernels.checkpoint import merge
from tests.cases import assert_same
from tests.checkpoints import files_in
from tests.llama_checkpoints import gaussians, loaded, models, save

pytestmark = pytest.mark.any_isa


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    return save(tmp_path / "models", models(gaussians, torch.float32))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


def documents(folders: list[str]) -> list[dict[str, Any]]:
    """Two that merge models, one that merges their results and has no name."""
    base, first, second, third = folders
    weight = {"weight": 0.5}
    return [
        {"base_model": "left", "merge_method": "nearswap", "models": [{"model": "right"}], "parameters": {"t": 0.1}},
        {
            "name": "right",
            "merge_method": "linear",
            "models": [{"model": "left"}, {"model": third}],
            "parameters": weight,
        },
        {
            "name": "left",
            "base_model": base,
            "merge_method": "task_arithmetic",
            "models": [{"model": first}, {"model": second}],
            "parameters": weight,
        },
    ]


def written(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text(yaml.safe_dump_all(given))
    return path


@pytest.fixture
def recipe(tmp_path: Path, folders: list[str]) -> Path:
    return written(tmp_path / "recipe.yml", documents(folders))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_as_mergekit(recipe: Path, tmp_path: Path, out: Path) -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed", exc_type=ImportError)
    command = importlib.import_module("mergekit.scripts.multimerge").main
    given = [str(recipe), "--out-path", str(tmp_path / "theirs"), "-I", str(tmp_path / "between"), "--quiet"]
    command.main([*given, "--no-copy-tokenizer"], standalone_mode=False)
    merge(recipe, out)
    expected = loaded(tmp_path / "theirs")
    ours = loaded(out)
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        assert_same(tensor, expected[name], name)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_kept_intermediates(recipe: Path, tmp_path: Path, out: Path) -> None:
    """They are passed over where they are there already, unless they are of another merge."""
    between = tmp_path / "deep" / "between"
    merge(recipe, out, intermediate_dir=between)
    assert sorted(os.listdir(between)) == ["left", "left.identity", "right", "right.identity"]
    before = {name: (between / name / "model.safetensors").stat().st_mtime_ns for name in ("left", "right")}
    result = run("merge", recipe, tmp_path / "again", "--intermediate-dir", between)
    assert result.exit_code == 0 and f"{between / 'left'} is there already\n" in result.stdout
    assert before == {name: (between / name / "model.safetensors").stat().st_mtime_ns for name in before}
    weights = "model.safetensors"
    assert files_in(tmp_path / "again")[weights] == files_in(out)[weights]
    recipe.write_text(recipe.read_text().replace("0.5", "0.25"))
    result = run("merge", recipe, tmp_path / "other", "--intermediate-dir", between)
    message = f"left must be of the same recipe, checkpoints and options, got '{between / 'left'}' of another merge"
    assert result.exit_code == 2 and message in result.stderr
    (between / "left.identity").unlink()  # as of another tool: whoever put it there knows
    (between / "right.identity").unlink()
    assert run("merge", recipe, tmp_path / "other", "--intermediate-dir", between).exit_code == 0


def test_the_command(recipe: Path, out: Path) -> None:
    result = run("merge", recipe, out)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.endswith(":")] == ["left:", "right:"]
    wrote = [line.partition(": ")[0] for line in lines if line.startswith("wrote ")]
    between = f"{out}.partial/intermediates"
    assert wrote == [f"wrote {between}/left", f"wrote {between}/right", f"wrote {out}"]


def test_cards(recipe: Path, folders: list[str], out: Path, tmp_path: Path) -> None:
    """That of the result names the models it was made from and has all of the recipe, not where it was made."""
    merge(recipe, out, intermediate_dir=tmp_path / "between")
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == folders
    assert recipe.read_text().strip() in card and "between" not in card
    left = (tmp_path / "between" / "left" / "README.md").read_text()
    assert "name: left" in left and "name: right" not in left


def test_the_tokenizer_of_a_result(recipe: Path, folders: list[str], out: Path) -> None:
    for number, folder in enumerate(folders):
        tokens = {f"{number}t{i}": i for i in range(40)}
        (Path(folder) / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    given = documents(folders)
    given[0] |= {"base_model": folders[1], "models": [{"model": "right"}], "tokenizer_source": "left"}
    merge(written(recipe, given), out)
    assert (out / "tokenizer.json").read_bytes() == (Path(folders[0]) / "tokenizer.json").read_bytes()


def test_the_only_end_of_named_documents(recipe: Path, folders: list[str], out: Path) -> None:
    merge(recipe, out)
    named = [{"name": "last", **document} if "name" not in document else document for document in documents(folders)]
    result = run("merge", written(recipe, named), out.with_name("named"))
    assert result.exit_code == 0
    assert "notice: last is merged into out: no other document needs it\n" in result.stdout
    weights = "model.safetensors"
    assert files_in(out.with_name("named"))[weights] == files_in(out)[weights]


def test_dry_run(recipe: Path, out: Path) -> None:
    """What needs results that are not there yet is named, not planned."""
    result = run("merge", recipe, out, "--dry-run")
    assert result.exit_code == 0 and os.listdir(out.parent) == []
    left, right = result.stdout.split("right:\n")
    assert "tensors  " in left and "would take about a second\n" in left
    assert right == "method  linear, scope tensor\nmodels  left\n" + right[right.index("        /") :]
    assert "method  nearswap over left, scope tensor\nmodels  right\n" in right


def test_a_second_document_that_does_not_fit(recipe: Path, folders: list[str], out: Path, tmp_path: Path) -> None:
    """Is a failure on the way; what was done stays, and is used when the document is right."""
    given = documents(folders)
    smaller = {name: tensor[:4] for name, tensor in loaded(Path(folders[3])).items()}
    given[1]["models"][1]["model"] = save(tmp_path / "smaller", [smaller])[0]
    result = run("merge", written(recipe, given), out)
    assert result.exit_code == 1 and "to go on allow vocabulary, shape" in result.stderr
    assert (out.with_name("out.partial") / "intermediates" / "left").is_dir() and not out.exists()
    result = run("merge", written(recipe, documents(folders)), out)
    assert result.exit_code == 2 and "resume it, or remove it" in result.stderr
    result = run("merge", recipe, out, "--resume")
    assert result.exit_code == 0 and "left is there already\n" in result.stdout
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("number", [0, 2])
def test_a_last_document_that_fails_loses_nothing_but_itself(
    recipe: Path, folders: list[str], out: Path, number: int
) -> None:
    given = documents(folders)
    path = Path(folders[2 if number else 3])
    tensors = loaded(path)
    save(path.parent / "broken", [{name: tensor * torch.inf for name, tensor in tensors.items()}])
    broken = str(path.parent / "broken" / "base")
    given[number]["models"][0]["model"] = broken
    with pytest.raises(RuntimeError, match="must be finite"):
        merge(written(recipe, given), out)
    kept = out.with_name("out.partial") / "intermediates"
    assert sorted(os.listdir(out.parent)) == (["out.partial"] if number == 0 else [])
    assert number or sorted(os.listdir(kept)) == ["left", "left.identity", "right", "right.identity"]


def test_errors(recipe: Path, folders: list[str], out: Path, tmp_path: Path) -> None:
    given = documents(folders)

    def refused(message: str, where: Path | None = out, **options: Any) -> None:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            merge(written(recipe, given), where, **options)
        assert os.listdir(out.parent) == []

    refused("out must be given for a recipe without a name, got none", None, intermediate_dir=tmp_path / "x")
    given[1]["models"].append({"model": str(tmp_path / "absent" / "model")})
    with pytest.raises(FileNotFoundError, match="reference must be a path or a model of the Hub, .*absent/model"):
        merge(written(recipe, given), out)
    del given[1]["models"][2]
    given[1]["models"][0]["model"] = "lfet"
    refused("models must be documents of the recipe (right, left), folders or models of the Hub, got 'lfet'")
    del given[0], given[0]["models"][0]
    refused("recipe must have one document that no other needs to be merged into out, got right, left")
    refused("intermediate_dir must be given for a recipe that has a name, got none", None)
    merge(recipe, None, intermediate_dir=tmp_path / "between")
    assert (tmp_path / "between" / "left" / "config.json").exists()
