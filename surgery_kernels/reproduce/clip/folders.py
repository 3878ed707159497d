"""Which tasks the two folders of a run have: an expert in the one, images in the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .published import TASKS, canonical


@dataclass(frozen=True)
class Task:
    """A task and where its expert and its images are."""

    name: str
    expert: Path
    images: Path  # holds a folder for each split


@dataclass(frozen=True)
class Found:
    """The tasks of a run, and what was left out for want of its other half."""

    pretrained: Path
    tasks: list[Task]
    without_images: list[Path]
    without_expert: list[Path]


def find_tasks(
    model_dir: Path, data_dir: Path, *, pretrained: str = "pretrained", wanted: Sequence[str] | None = None
) -> Found:
    """Pairs the experts of `model_dir` with the images of `data_dir`, in the paper's order, then by name.

    Args:
        model_dir: Folder of model folders: `pretrained`, and per task one called ``<task>`` or ``<pretrained>_<task>``.
        data_dir: Folder of task folders.
        pretrained: Name of the pretrained model's folder, or a path.
        wanted: Tasks that must be there, the only ones taken; all that are complete if None.

    Raises:
        InputError: a folder is missing, or a task that is wanted has no expert or no images.
    """
    for option, folder in (("--model-dir", model_dir), ("--data-dir", data_dir)):
        if not folder.is_dir():
            raise InputError(f"{option} must be a folder, got {folder}")
    pretrained_folder = model_dir / pretrained
    if not is_model(pretrained_folder):
        models = ", ".join(path.name for path in sub_folders(model_dir) if is_model(path)) or "none"
        raise InputError(
            f"--model-dir must hold the folder of a pretrained model with a config.json, got no {pretrained!r} in "
            f"{model_dir} (models there: {models}): name it with --pretrained"
        )
    experts = {
        canonical(path.name.removeprefix(f"{pretrained_folder.name}_")): path
        for path in sub_folders(model_dir)
        if is_model(path) and path != pretrained_folder
    }
    images = {canonical(path.name): path for path in sub_folders(data_dir)}

    names = sorted(experts.keys() & images.keys(), key=paper_order)
    if wanted is not None:
        for name in map(canonical, wanted):
            if name not in experts:
                raise InputError(f"--tasks must have an expert each, got none for {name!r} in {model_dir}")
            if name not in images:
                raise InputError(f"--tasks must have images each, got none for {name!r} in {data_dir}")
        names = list(dict.fromkeys(map(canonical, wanted)))
        experts, images = ({name: found[name] for name in names} for found in (experts, images))
    if not names:
        raise InputError(
            f"--model-dir and --data-dir must share a task, got experts for {', '.join(experts) or 'none'} and images "
            f"for {', '.join(images) or 'none'}"
        )
    return Found(
        pretrained_folder,
        [Task(name, experts[name], images[name]) for name in names],
        without_images=[path for name, path in experts.items() if name not in names],
        without_expert=[path for name, path in images.items() if name not in names],
    )


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def sub_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def paper_order(name: str) -> tuple[int, str]:
    return TASKS.index(name) if name in TASKS else len(TASKS), name
