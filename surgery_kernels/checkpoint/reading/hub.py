"""Models of the Hugging Face Hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Collection
from pathlib import Path

from .companions import UNWANTED, WANTED
from .files import files_below
from .parts import ADAPTER_FILES, INDICES, MODEL_FILES, anatomy

REFERENCE = re.compile(r"(?P<model>[\w.-]*\w/\w[\w.-]*)(@(?P<revision>.+))?")  # org/name@revision
INSIDE = re.compile(r"(?P<model>[\w.-]*\w/(?P<name>\w[\w.-]*))/(?P<folder>[^@]+?)/?(@.+)?")  # org/name/folder
ADAPTER_CONFIG = "adapter_config.json"
INDEX_FILES = ["*.index.json", "*.index.*.json", ADAPTER_CONFIG]  # they say which weights are wanted


def download(reference: str, *, weights: bool = True) -> tuple[Path, Collection[str]]:
    """A folder in the local cache with what a merge needs of a model, and the names of all files that the model has.

    First comes what is small; that says which weights are needed. Without a network it is what the cache has.
    Without `weights` it is only what is small, and no names.

    Raises:
        FileNotFoundError: the reference is no such model, or cannot be had.
        ImportError: huggingface_hub is not installed.
        ValueError: nothing says which of its files counts.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        inside = (
            None
            if Path(reference).parts[:1] and Path(Path(reference).parts[0]).exists()
            else INSIDE.fullmatch(reference)
        )
        way_on = (
            f": of a folder within {inside['model']}, run `hf download {inside['model']} --include "
            f"'{inside['folder']}/*' --local-dir {inside['name']}` and name {inside['name']}/{inside['folder']}"
            if inside
            else ""
        )
        raise FileNotFoundError(
            f"reference must be a path or a model of the Hub, org/name[@revision], got {reference!r}{way_on}"
        )
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"huggingface_hub must be installed for a model of the Hub, got no path {reference!r} here and: {error}; "
            f"run `pip install huggingface_hub`"
        ) from error
    model, revision = match["model"], match["revision"]

    def fetch(wanted: Collection[str], but: Collection[str] = ()) -> Path:
        try:
            return Path(
                snapshot_download(model, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(but))
            )
        except (OSError, ValueError) as error:  # what huggingface_hub raises is one of them
            reason = str(error).strip().partition("\n")[0]
            if isinstance(error, GatedRepoError):
                reason = f"accept its conditions at https://huggingface.co/{model} and run `hf auth login`"
            elif isinstance(error, RepositoryNotFoundError):
                reason = "there is none of that name, or it is private: then run `hf auth login`"
            raise FileNotFoundError(
                f"reference must be a path or a model of the Hub that can be had, got {reference!r}: {reason}"
            ) from error

    folder = fetch(WANTED, UNWANTED)
    if not weights:
        return folder, ()
    try:
        names = {file.rfilename for file in HfApi().model_info(model, revision=revision).siblings or ()}
    except Exception:  # no network, of which there are many kinds: `fetch` has found the model in the cache
        return folder, set(files_below(folder))
    if any(INDICES.fullmatch(name) or name == ADAPTER_CONFIG for name in names):
        folder = fetch(INDEX_FILES)
    files = _weights(reference, folder, names)
    return fetch([glob.escape(name) for name in files]), names


def _weights(reference: str, folder: Path, names: Collection[str]) -> list[str]:
    """The names of the files with the weights of a model or an adapter."""
    if ADAPTER_CONFIG in names and not any(name.startswith(MODEL_FILES) for name in names):
        return [file for file in ADAPTER_FILES if file in names][:1] or [ADAPTER_CONFIG]
    return [file for part in anatomy(reference, folder, names).parts for file in part.files(folder)]
