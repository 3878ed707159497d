"""Models of the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

REFERENCE = re.compile(r"(?P<model>[\w.-]*\w/\w[\w.-]*)(@(?P<revision>.+))?")  # org/name@revision

DESCRIPTIONS = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
SAFETENSORS = ["model.safetensors", "model-*.safetensors", "adapter_model.safetensors"]
PICKLES = ["pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin"]


def download(reference: str) -> Path:
    """The folder of a model in the local cache, where what was missing is now; PyTorch files only without safetensors.

    Raises:
        FileNotFoundError: the reference is no such model, or cannot be had.
        ImportError: huggingface_hub is not installed.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise FileNotFoundError(
            f"reference must be a path or a model of the Hub, org/name[@revision], got {reference!r}"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"huggingface_hub must be installed for a model of the Hub, got no path {reference!r} here and: {error}; "
            f"run `pip install huggingface_hub`"
        ) from error
    model, revision = match["model"], match["revision"]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*DESCRIPTIONS, *SAFETENSORS]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*DESCRIPTIONS, *PICKLES]))
    except (OSError, ValueError) as error:  # what huggingface_hub raises is one of them
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"reference must be a path or a model of the Hub that can be had, got {reference!r}: {reason}"
        ) from error
    return folder
