"""What comes along with the weights of a model: everything small that says how to use it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from .files import link_out_of
from .parts import READABLE, TRAINING
from .source import Source

LEGAL = ("*LICENSE*", "*LICENCE*", "*NOTICE*", "*COPYING*")
# Of names within a folder, where * passes over "/" too, as for huggingface_hub; also what is fetched from the Hub.
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.yaml", "*.yml", "*.toml", "*.tsv", "*.md")
TOKENS = ("*.model", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.vocab", "*.npy", "*.npz")  # and filters of sounds
CODE = ("*.py", "*.pyi", "*.cpp", "*.cu", "*.cuh", "*.h")
WANTED = (*SETTINGS, *TOKENS, *CODE, *LEGAL)
UNWANTED = (
    *(".*", "*/.*", "*__pycache__/*"),
    *("*.index.json", "*.index.*.json", "adapter_config.json"),  # they say what the weights are
    "*surgery_kernels.json",  # of another result
    *("trainer_state.json", "training_args.*", "*_results.json", "checkpoint-*/*", "runs/*"),  # of the training
    *("onnx/*", "*/onnx/*", "openvino/*", "*/openvino/*", "*.mlpackage/*", "original/*"),  # the same model for others
)
OF_CARDS = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.mp4", "*.ipynb", "*.log")
CARD = "README.md"
MAX_BYTES = 100 << 20  # of a file; a larger one is data
OTHER_WEIGHTS = (*READABLE, ".onnx", ".gguf", ".h5", ".msgpack", ".ot", ".tflite", ".mlmodel", ".distcp")
# The same weights once more, in another format or variant.
COPIES = re.compile(r"(((pytorch|tf|flax|rust|diffusion_pytorch|open_clip|open_clip_pytorch)_)?model|consolidated)\b.*")
OF_A_FILE = (".json", ".yaml", ".yml", ".txt")  # behind the name that it shares with the weights


@dataclass(frozen=True)
class Companions:
    """Files beside the weights, by their names in the result."""

    files: dict[str, Path]
    left: tuple[str, ...] = ()  # names of what stays behind, though it may matter

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def companions(model: Source) -> Companions:
    """What comes along with a model; nothing of it is run.

    Raises:
        ValueError: a file is a link to somewhere else, which may be private.
    """
    folder = model.folder
    if folder is None:
        return _beside_a_file(model.files[0].path)
    names = sorted(model.anatomy.names)
    foreign = {
        str(above)
        for name in names
        if name.endswith(OTHER_WEIGHTS)
        for above in list(PurePosixPath(name).parents)[:-1]
        if str(above) not in model.anatomy.folders
    }
    read = {stamp.path for stamp in model.files}
    files, left = {}, []
    for name in names:
        path = folder / name
        apart = next((str(above) for above in reversed(PurePosixPath(name).parents) if str(above) in foreign), None)
        if _matches(name, UNWANTED) or path in read:
            continue
        if apart is not None:
            left.append(f"{apart}/")
        elif name.endswith(OTHER_WEIGHTS):
            if not (COPIES.fullmatch(path.name) or TRAINING.fullmatch(path.name)):
                left.append(name)
        elif _matches(name, WANTED) and path.is_file() and path.stat().st_size <= MAX_BYTES:
            files[name] = _checked(folder, path)
        elif not _matches(name, OF_CARDS):
            left.append(name)
    left += [f"{path.name}/" for path in sorted(folder.iterdir()) if path.is_symlink() and path.is_dir()]
    return Companions(files, tuple(dict.fromkeys(left)))


def _beside_a_file(weights: Path) -> Companions:
    """What has its name, and the licence: the other files of the folder may belong to other models."""
    files = {f"model{end}": path for end in OF_A_FILE if (path := weights.with_suffix(end)).is_file()} | {
        path.name: path for pattern in LEGAL for path in sorted(weights.parent.glob(pattern)) if path.is_file()
    }
    return Companions({name: _checked(weights.parent, path) for name, path in files.items()})


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _checked(folder: Path, path: Path) -> Path:
    if target := link_out_of(folder, path):
        raise ValueError(
            f"{path} must lie in its folder, got a link to {target}: put a copy in its place, or remove it"
        )
    return path
