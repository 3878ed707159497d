"""The files beside the weights: as they are, but for the configuration; and our index and model card."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ..plan import Plan
from ..reading.companions import CARD
from ..reading.folder import CONFIG
from .card import model_card
from .config import write_config
from .durable import copy_file, fsync_folder, make_folders, write_text


def write_companions(folder: Path, plan: Plan, name: str) -> None:
    """Everything of the result besides the weights; the same bytes for the same plan."""
    configs = {f"{part.prefix}{CONFIG}": part for part in plan.first.anatomy.parts}
    files = {**plan.companions.files, **plan.vocabularies.files}
    for file, content in files.items():
        make_folders(folder, file)
        if part := configs.get(file):
            write_config(plan.companions.files[file], folder / file, plan, part)
        elif isinstance(content, Path) and file != CARD:
            copy_file(content, folder / file)
        elif isinstance(content, str):
            write_text(folder / file, content)
    for file, text in plan.layout.indices().items():
        write_text(folder / file, text)
    write_text(folder / CARD, model_card(plan, name))
    for above in {PurePosixPath(file).parent for file in files}:
        fsync_folder(folder / above)
