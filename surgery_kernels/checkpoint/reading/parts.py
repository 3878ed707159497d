"""Which files of a folder are the weights of a model, and of which component of it; decided by names alone."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .files import read_json

# Of several the first is the model, as for transformers; the value is what the result's files are called.
STEMS = {
    "model.safetensors": "model",
    "pytorch_model.bin": "model",
    "diffusion_pytorch_model.safetensors": "diffusion_pytorch_model",
    "diffusion_pytorch_model.bin": "diffusion_pytorch_model",
    "open_clip_model.safetensors": "open_clip_model",
    "open_clip_pytorch_model.bin": "open_clip_model",
    "consolidated.safetensors": "consolidated",
    "consolidated.00.pth": "consolidated",
}
MODEL_FILES = tuple(STEMS)
SLICED = ("consolidated.00.pth", "consolidated.01.pth")  # by the GPUs that each part of a tensor was for
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
READABLE = (".safetensors", *TORCH_SUFFIXES)
INDEX = ".index.json"  # behind the name of a model file that is split into shards
PIPELINE, MODULES = "model_index.json", "modules.json"  # of diffusers and of sentence-transformers
INDICES = re.compile(r"(?P<file>.+\.(safetensors|bin))\.index(\.(?P<variant>\w+))?\.json")
SHARD = re.compile(r"-\d+-of-(?!0*1\.)\d+\.\w+$")  # one of several
# What trainers leave beside a model.
TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state\w*|adapter_model)\.\w+")
EXPORTS = ("onnx", "openvino")  # the same model for another runtime
OUTSIDE = re.compile(r"[/\\:]|^\.\.$")  # in names of what may lie elsewhere


@dataclass(frozen=True)
class Part:
    """The weights of a model, or of one component of it."""

    folder: str  # within the model's, "" for its own; in front of the names of its tensors
    file: str  # of that folder: the weights or the index of their shards
    stem: str  # of the files of the result

    @property
    def prefix(self) -> str:
        return f"{self.folder}/" if self.folder else ""

    def files(self, root: Path) -> list[str]:
        """What has to be read, by names within the model's folder."""
        if not INDICES.fullmatch(self.file):
            return [f"{self.prefix}{self.file}"]
        shards = sorted(set(read_index(root / self.prefix / self.file).values()))
        return [f"{self.prefix}{file}" for file in (self.file, *shards)]


@dataclass(frozen=True)
class Anatomy:
    """What a folder is made of."""

    parts: tuple[Part, ...]
    names: frozenset[str]  # of all its files, whatever they are
    folders: frozenset[str] = field(default=frozenset({""}))  # with weights or without, that its own files name

    def part_of(self, name: str) -> Part:
        """That of a tensor."""
        fitting = [part for part in self.parts if name.startswith(part.prefix)]
        return max(fitting, key=lambda part: len(part.folder))

    @property
    def stems(self) -> dict[str, str]:
        """Of the files of a result with the same components, by what is in front of the names of their tensors."""
        return {part.prefix: f"{part.prefix}{part.stem}" for part in self.parts}


def anatomy(name: str, root: Path, names: Collection[str]) -> Anatomy:
    """Of the folder `root`, which has, or will have, the files called `names`; the JSON files among them are there.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: nothing says which of several files counts, or something lies outside of the folder.
    """
    if PIPELINE in names:
        return _pipeline(name, root, names)
    if MODULES in names and (folders := _modules(root / MODULES)):
        found = {folder: weights_in(root, folder, names) for folder in folders}
        for inner in _below([folder for folder in folders if folder], names):
            found[inner] = weights_in(root, inner, names)
        parts = tuple(part for part in found.values() if part)
        if parts and not ("" in found and found[""] is None):
            return Anatomy(parts, frozenset(names), frozenset({"", *found}))
    part = weights_in(root, "", names)
    if part is None:
        raise FileNotFoundError(f"{name} must be a folder with {', '.join(_expected())}, got {_instead(names)}")
    return Anatomy((part,), frozenset(names))


def weights_in(root: Path, folder: str, names: Collection[str]) -> Part | None:
    """The weights that lie directly in a folder; None without any.

    Raises:
        ValueError: nothing says which of several files counts.
    """
    where = root / folder
    own = _directly_in(folder, names)
    for file, stem in STEMS.items():
        if chosen := _file_or_index(where, file, own):
            return Part(folder, chosen, stem)
    variants = [name for name in own if _plain(name)]  # fp16, non_ema, ...: of the plain file that is not there
    indices = [name for name in own if INDICES.fullmatch(name)]
    others = [name for name in own if name.endswith(READABLE) and not TRAINING.fullmatch(name)]
    candidates = sorted(_safetensors_first(variants) or indices or _safetensors_first(others))
    if not candidates:
        return None
    found = ", ".join(candidates[:5])
    if all(SHARD.search(candidate) for candidate in candidates):
        raise ValueError(f"{where} must have an index of its shards (*{INDEX}), got none beside {found}")
    if len(candidates) > 1:
        raise ValueError(f"{where} must have one file of weights, got {found}: name the one that you mean")
    return Part(folder, candidates[0], stem_of(candidates[0]))


def stem_of(file: str) -> str:
    """Of the files of a result that takes after a file of that name."""
    return STEMS.get(_plain(file) or file.removesuffix(INDEX), "model")


def read_index(index: Path) -> dict[str, str]:
    """The file of every tensor.

    Raises:
        ValueError: it names none, or files of another folder.
    """
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} must hold a weight_map from names of tensors to files, got {shard_of!r}")
    for file in shard_of.values():
        # a path would let the index of a download read any file of this machine
        if not isinstance(file, str) or OUTSIDE.search(file):
            raise ValueError(f"{index} must name files of its own folder, got {file!r}")
    return shard_of


def _file_or_index(where: Path, file: str, own: Collection[str]) -> str | None:
    index = f"{file}{INDEX}"
    if index not in own:
        if file not in own:
            return None
        if file == SLICED[0] and SLICED[1] in own:
            raise ValueError(
                f"{where} must have whole tensors, got {', '.join(SLICED)}, ..., which hold slices of them: join them "
                "with the model's converter, such as convert_llama_weights_to_hf.py of transformers"
            )
        return file
    if file not in own:
        return index
    shards = set(read_index(where / index).values())
    if file in shards:
        return index
    if shards <= set(own):
        raise ValueError(f"{where} must have one model, got {file} and the shards of {index}: name the one you mean")
    return file  # an index that was left behind


def _plain(name: str) -> str | None:
    """Of ``model.fp16.safetensors`` and ``model.safetensors.index.fp16.json`` what it is a variant of."""
    index = INDICES.fullmatch(name)
    if index and index["variant"]:
        return index["file"]
    variant = re.fullmatch(r"(?P<stem>.+)\.\w+\.(?P<suffix>\w+)", name.removesuffix(INDEX))
    plain = f"{variant['stem']}.{variant['suffix']}" if variant else ""
    return plain if plain in STEMS else None


def _safetensors_first(files: list[str]) -> list[str]:
    return [name for name in files if ".safetensors" in name] or files


def _pipeline(name: str, root: Path, names: Collection[str]) -> Anatomy:
    """Components of diffusers: every entry of the index that is a library and a class lies in a folder of that name."""
    parts, folders = [], {""}
    for component, what in read_json(root / PIPELINE).items():
        if not (isinstance(what, list) and len(what) == 2 and all(isinstance(word, str) for word in what)):
            continue
        _check_inside(root / PIPELINE, component)
        if not any(file.startswith(f"{component}/") for file in names):
            instead = "a link: put a copy in its place" if (root / component).is_symlink() else "none"
            raise FileNotFoundError(f"{root / component} must be a folder with the {what[1]} of {name}, got {instead}")
        folders.add(component)
        if part := weights_in(root, component, names):
            parts.append(part)
    if not parts:
        raise FileNotFoundError(f"{name} must have components with weights, got none of those in {root / PIPELINE}")
    return Anatomy(tuple(parts), frozenset(names), frozenset(folders))


def _modules(path: Path) -> list[str]:
    """The folders of sentence-transformers' modules, "" for the model's own; empty for another kind of file."""
    modules: Any = json.loads(path.read_bytes())
    entries = [entry for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    folders = [entry["path"].strip("/") for entry in entries if isinstance(entry.get("path"), str)]
    for folder in folders:
        for step in PurePosixPath(folder).parts:
            _check_inside(path, step)
    return folders


def _below(folders: Iterable[str], names: Collection[str]) -> list[str]:
    """Folders within modules: of a router, of a transformer in a folder of its own; but no exports."""
    inner = {
        str(above)
        for folder in folders
        for name in names
        if name.startswith(f"{folder}/") and name.endswith(READABLE)
        for above in [PurePosixPath(name).parent]
        if str(above) != folder and not set(above.parts) & set(EXPORTS)
    }
    return sorted(inner)


def _directly_in(folder: str, names: Collection[str]) -> set[str]:
    start = f"{folder}/" if folder else ""
    return {rest for name in names if name.startswith(start) and "/" not in (rest := name[len(start) :])}


def _check_inside(path: Path, folder: str) -> None:
    if OUTSIDE.search(folder):
        raise ValueError(f"{path} must name folders beside it, got {folder!r}")


def _expected() -> list[str]:
    return [
        f"model.safetensors[{INDEX}]",
        f"pytorch_model.bin[{INDEX}]",
        PIPELINE,
        "other weights or adapter_config.json",
    ]


# By the end of a name: what else weights are stored as, and the way on.
ELSEWHERE = {
    "tf_model.h5": "a TensorFlow model: load it with transformers 4, from_tf=True, and save it",
    "flax_model.msgpack": "a Flax model: load it with transformers 4, from_flax=True, and save it",
    ".gguf": "GGUF, which is quantized: dequantize it first, or take the model it was made from",
    ".onnx": "ONNX: take the original of the model in safetensors",
    ".distcp": "a distributed checkpoint: make a file of it by dcp_to_torch_save of torch.distributed.checkpoint",
    "zero_to_fp32.py": "a checkpoint of DeepSpeed: run its zero_to_fp32.py first",
}


def _instead(names: Collection[str]) -> str:
    for end, what in ELSEWHERE.items():
        if any(name.endswith(end) for name in names):
            return what
    if models := sorted({name.partition("/")[0] for name in names if "/" in name and name.endswith(READABLE)}):
        return f"a folder with models in {', '.join(models[:5])}: name one of those"
    return f"a folder with {', '.join(sorted({name.partition('/')[0] for name in names})[:5]) or 'nothing'}"
