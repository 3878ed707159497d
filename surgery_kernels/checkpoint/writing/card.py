"""The README.md of a result: what it was made from and how, then the card of the model that its other files are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from ... import _C
from ...recipes.model_reference import ModelReference
from ..plan import Plan
from ..reading.companions import CARD

FENCE = "---\n"  # around what the Hub reads of a card
OF_ANOTHER_MODEL = ("model-index", "base_model_relation", "new_version")  # true of the donor only


def model_card(plan: Plan, name: str) -> str:
    recipe = plan.recipe
    donor, text = _read(plan.first.folder)
    about = {
        **{key: value for key, value in donor.items() if key not in OF_ANOTHER_MODEL},
        "base_model": list(dict.fromkeys(name for model in recipe.references for name in _models(plan, model))),
        "library_name": donor.get("library_name") or ("transformers" if plan.first.config else "safetensors"),
        "tags": list(dict.fromkeys([*_listed(donor.get("tags")), "merge", "surgery-kernels"])),
    }
    base = f" over the base {recipe.base}{_licence(plan, recipe.base)}" if recipe.base else ""
    experts = "\n".join(f"- {reference}{_licence(plan, reference)}" for reference in recipe.experts)
    how = f"A mixture around {recipe.donor}" if recipe.mixture else f"A merge by {recipe.method.title}{base}"
    card = (
        f"{FENCE}{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}{FENCE}\n"
        f"# {name}\n\n"
        f"{how} of\n\n{experts}\n\n"
        f"made by surgery_kernels {_C.build_info()['version']} with torch {torch.__version__} from this recipe:\n\n"
        f"```yaml\n{recipe.source.strip()}\n```\n"
    )
    if text:
        card += f"\nThe other files are those of {plan.first.name}, whose card follows; it is not about the merge.\n"
        card += f"\n{text}\n"
    return card


def _read(folder: Path | None) -> tuple[dict[str, Any], str]:
    """What the Hub reads of the card in a folder, and its text; nothing of no card."""
    path = folder and folder / CARD
    if path is None or not path.is_file():
        return {}, ""
    text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n").removeprefix("\ufeff")
    if text.startswith(FENCE):
        head, fence, body = text.removeprefix(FENCE).partition(f"\n{FENCE}")
        try:
            about = yaml.safe_load(head)
        except yaml.YAMLError:
            about = None
        if fence and isinstance(about, dict):
            return about, body.strip()
    return {}, text.strip()


def _models(plan: Plan, reference: ModelReference) -> list[str]:
    """A model, or those that it was made from as the result of an earlier document, by its card."""
    if reference.model.path not in plan.results:
        return [str(reference)]
    about, _ = _read(plan.sources[reference].folder)
    return _listed(about.get("base_model"))


def _licence(plan: Plan, reference: Any) -> str:
    about, _ = _read(plan.sources[reference].folder)
    licence = about.get("license_name") or about.get("license")
    return f" (license: {', '.join(_listed(licence))})" if licence else ""


def _listed(value: Any) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, list) else [str(value)] if value else []
