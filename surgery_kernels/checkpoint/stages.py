"""The merges of a recipe of several documents, one after the other, and where what lies between them is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..recipes import Recipe
from ..recipes.documents import needed
from .plan import Plan
from .reading.opening import find_folder
from .writing.durable import fsync_folder, write_text
from .writing.output import OutputFolder

IDENTITY = ".identity"  # behind the name of a result, in a file that says of which plan it is


@dataclass(frozen=True)
class Stage:
    """One merge."""

    recipe: Recipe
    out: Path
    results: Mapping[str, Path]  # of the stages before it that it needs, by name
    resume: bool  # whether to go on with what lies there unfinished
    is_last: bool = False

    @property
    def is_ready(self) -> bool:
        """Whether the results that it needs are there; so they are once the stages before it were carried out."""
        return all(path.exists() for path in self.results.values())

    def is_done(self, plan: Plan) -> bool:
        """Whether its own result is there already, from an earlier run; then it is not made again.

        Raises:
            ValueError: what is there was made from another recipe, other checkpoints or with other options.
        """
        folder = OutputFolder(self.out)
        if self.is_last or not folder.out.exists() or folder.partial.exists():
            return False
        # without the file somebody put it there, and knows
        identity = self._identity.read_text(encoding="utf-8") if self._identity.exists() else plan.identity
        if identity != plan.identity:
            raise ValueError(
                f"{self.recipe.name} must be of the same recipe, checkpoints and options, got {str(self.out)!r} of "
                "another merge: remove it to make it again"
            )
        return True

    def begin(self, plan: Plan) -> None:
        """Makes room for the result, and remembers whose it will be."""
        if not self.is_last:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._identity, plan.identity)
            fsync_folder(self.out.parent)

    @property
    def _identity(self) -> Path:
        return self.out.with_name(self.out.name + IDENTITY)


def stages(
    recipes: Sequence[Recipe],
    out: str | os.PathLike[str] | None,
    intermediate_dir: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
) -> Generator[Stage, None, None]:
    """The merges in order, each to be carried out before the next is asked for; close the iterator when done.

    Args:
        recipes: From `load_recipes`.
        out: Folder of the document without a name, or of the one that no other needs, which comes last; None: all have
            names and lie in `intermediate_dir`.
        intermediate_dir: Folder of the others; None: they lie in the unfinished result, and go when it is finished.
        resume: Go on with an unfinished result.

    Raises:
        ValueError, FileNotFoundError: there is no place for a result, or a recipe names what is neither a document nor
            a model.
    """
    folder = None if out is None else OutputFolder(out)
    if len(recipes) == 1 and folder:
        yield Stage(recipes[0], folder.out, {}, resume, is_last=True)
        return
    if folder:
        recipes = _with_last(recipes)
    names = [recipe.name for recipe in recipes if recipe.name is not None]
    _check_places(recipes, names, out, intermediate_dir)
    _check_models(recipes, names)
    if folder:
        folder.check(0, resume=resume)
    kept_in = (
        folder.intermediates if folder and intermediate_dir is None else Path(os.path.abspath(intermediate_dir or ""))
    )
    try:
        for recipe in recipes:
            results = {name: kept_in / name for name in needed(recipe, names)}
            if recipe.name is not None:
                yield Stage(recipe, kept_in / recipe.name, results, resume)
            elif folder:
                yield Stage(recipe, folder.out, results, resume or intermediate_dir is None, is_last=True)
    finally:
        if folder and folder.intermediates.exists() and not _has_results(folder.intermediates):
            shutil.rmtree(folder.partial)


def _with_last(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Those of which the last is merged into the folder of the result, and needs no name."""
    if any(recipe.name is None for recipe in recipes):
        return list(recipes)
    names = [recipe.name for recipe in recipes if recipe.name is not None]
    wanted = {name for recipe in recipes for name in needed(recipe, names)}
    ends = [recipe for recipe in recipes if recipe.name not in wanted]
    if len(ends) != 1:
        got = ", ".join(str(recipe.name) for recipe in ends)
        raise ValueError(f"recipe must have one document that no other needs to be merged into out, got {got}")
    *others, last = recipes  # all others lead to it
    notice = f"{last.name} is merged into out: no other document needs it"
    return [*others, replace(last, name=None, notices=(*last.notices, notice))]


def _has_results(folder: Path) -> bool:
    return any(path.is_file() and path.suffix != IDENTITY for path in folder.rglob("*"))


def _check_places(
    recipes: Sequence[Recipe],
    names: Sequence[str],
    out: str | os.PathLike[str] | None,
    intermediate_dir: str | os.PathLike[str] | None,
) -> None:
    if out is None and (len(names) < len(recipes) or len(recipes) == 1):
        raise ValueError("out must be given for a recipe without a name, got none")
    if out is None and intermediate_dir is None:
        raise ValueError("intermediate_dir must be given for a recipe that has a name, got none")


def _check_models(recipes: Sequence[Recipe], names: Collection[str]) -> None:
    """A model that is not there is found out before hours were spent on the documents before."""
    models = [model for recipe in recipes for model in recipe.references]
    for at in dict.fromkeys(at for model in models for at in (model.model, model.lora) if at and at.path not in names):
        if "/" not in at.path and not Path(at.path).expanduser().exists():
            raise ValueError(
                f"models must be documents of the recipe ({', '.join(names)}), folders or models of the Hub, "
                f"got {at.path!r}"
            )
        find_folder(str(at))
