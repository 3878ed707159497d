"""The pages of the manual: their examples run, their commands exist, and their tables are what they are made from."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click import Context

from surgery_kernels import cli
from surgery_kernels.cli.methods import methods_table, recipes_by_example
from surgery_kernels.recipes import parse_recipes
from tests.checkpoints import save_safetensors, state_dict
from tests.encoders import Encoder
from tests.sentence_models import sentence_models

pytestmark = pytest.mark.any_isa

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def of_surgery() -> dict[str, Any]:
    """What the examples of surgery take for granted."""
    models = [Encoder() for _ in range(3)]
    images = torch.randn(6, 5, 3)
    return {
        **{"merged": models[0], "model": models[0], "mnist_expert": models[1], "svhn_state": models[2].state_dict()},
        **{"mnist_images": images, "svhn_images": images + 1, "images": images},
    }


def of_methods() -> dict[str, Any]:
    for seed, name in enumerate(("base", "math", "code")):
        save_safetensors(Path("models") / name, state_dict(seed))
    return {}


GIVEN = {"README.md": of_surgery, "surgery.md": of_surgery, "methods.md": of_methods}


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=lambda path: path.stem)
def test_examples(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = blocks(path, "python")
    if any("SentenceTransformer(" in example for example in examples):  # these install our methods in mergekit
        registry = pytest.importorskip("mergekit.merge_methods.registry", reason="mergekit is not installed")
        importlib.import_module("surgery_kernels.integrations.mergekit")
        monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
        (tmp_path / "bert").mkdir()
        for name, model in zip(("base", "first", "second"), sentence_models(tmp_path / "bert"), strict=True):
            model.save_pretrained(name)
    names = GIVEN.get(path.name, dict)()
    for example in examples:
        exec(compile(example, str(path), "exec"), names)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "yaml")], ids=lambda path: path.stem)
def test_recipes(path: Path) -> None:
    for text in blocks(path, "yaml"):
        assert parse_recipes(text, strict=True)


def commands_of(path: Path) -> list[str]:
    """What the indented lines tell to type, without its comment."""
    lines = re.findall(r"^ {4}(surgery-kernels .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [line.split("  #")[0] for line in lines]


@pytest.mark.parametrize(
    ("page", "command"),
    [(path.stem, command) for path in PAGES for command in commands_of(path)],
    ids=lambda value: value,
)
def test_commands(page: str, command: str) -> None:
    _, name, *words = command.split()
    found = cli.main.get_command(Context(cli.main), name)
    assert found is not None
    options = {option for parameter in found.params for option in parameter.opts + parameter.secondary_opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_the_table_of_methods_is_what_they_declare() -> None:
    assert f"<!-- methods -->\n{methods_table()}\n<!-- /methods -->" in text_of("docs/methods.md")


def test_recipes_by_example() -> None:
    """They are those of the declarations, which tests/checkpoint/test_declarations.py merges by."""
    assert f"<!-- examples -->\n{recipes_by_example()}\n<!-- /examples -->" in text_of("docs/recipes.md")


def test_the_front_page_shows_rows_of_the_benchmarks() -> None:
    rows = [line for line in text_of("README.md").splitlines() if line.startswith("| `")]
    assert rows and set(rows) <= set(text_of("docs/benchmarks.md").splitlines())


def test_every_page_is_reached() -> None:
    pages = {path.name for path in PAGES[1:]}
    assert set(re.findall(r"\w+\.md", text_of("mkdocs.yml"))) == pages
    assert {f"docs/{name}" for name in pages - {"index.md", "changelog.md"}} <= set(
        re.findall(r"docs/\w+\.md", text_of("README.md"))
    )


def test_links_lead_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_one_version() -> None:
    version = re.search(r'^version = "(.*)"$', text_of("pyproject.toml"), re.MULTILINE)
    newest = re.search(r"^## (.*)$", text_of("CHANGELOG.md"), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", text_of("CITATION.cff"), re.MULTILINE)
    assert version and newest and cited and version[1] == newest[1] == cited[1]
