"""Experts kept as one shared model, masks and a scale for each, in one file, from which any of them is put together.

A file in safetensors' format: of every merged tensor "shared.NAME" in its dtype and "masks.NAME", uint8 [num_tasks,
ceil(numel / 8)], and float64 "scales" [num_tasks] and "samples", by which the base is known again.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..merging import METHODS
from ..merging.methods.masks import Packable
from ..merging.scope import Scope
from ..merging.state_dicts import StateDict, method_of, owners_of
from ..ops import arguments
from .reading.mapped_file import MappedFile
from .reading.opening import open_checkpoint
from .reading.safetensors_file import read_safetensors
from .reading.source import FileStamp, Source
from .writing.durable import fsync_folder, reserve
from .writing.layout import lay_out

PACKABLE = tuple(name for name, method in METHODS.items() if issubclass(method, Packable))
KEY = "surgery_kernels.packed"  # of the metadata
SAMPLES = 64  # entries of every tensor of the base

Model = StateDict | str | os.PathLike[str]


@dataclass(frozen=True)
class PackedExperts:
    """What a file of `pack_experts` holds, as views of it; `expert` reads what it needs."""

    method: str
    tasks: tuple[str, ...]
    scales: tuple[float, ...]
    shared: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    samples: Mapping[str, Tensor]
    tied: Mapping[str, str]  # names with the memory of another

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> PackedExperts:
        """
        Raises:
            FileNotFoundError, ValueError: there is no such file, or it is not one of packed experts, or not complete.
        """
        infos = read_safetensors(Path(path))
        with safe_open(path, framework="np") as file:
            facts = (file.metadata() or {}).get(KEY)
        if facts is None:
            raise ValueError(f"path must be a file of packed experts, got {os.fspath(path)!r}")
        known = json.loads(facts)
        mapped = MappedFile(FileStamp.of(Path(path)))
        tensors = {name: mapped.tensor(info) for name, info in infos.items()}
        shared = _of("shared.", tensors)
        counts = [_num_samples(tensor) for tensor in shared.values()]
        return cls(
            known["method"],
            tuple(known["tasks"]),
            tuple(tensors["scales"].tolist()),
            shared,
            _of("masks.", tensors),
            dict(zip(shared, tensors["samples"].split(counts), strict=True)),
            known["tied"],
        )

    def expert(self, task: str, base: Model) -> dict[str, Tensor]:
        """The model of a task: ``base + scale * mask * (shared - base)``, in one read.

        Args:
            task: One of `tasks`.
            base: The model that the experts were packed with, as a state dict or a checkpoint.

        Returns:
            A state dict in the order of the base, on its devices; buffers of integers are copies of the base's.

        Raises:
            ValueError, TypeError: there is no such task, or the base is another model.
        """
        arguments.check_one_of("task", task, self.tasks)
        t = self.tasks.index(task)
        with _opened([base]) as (state,):
            self._check(state)
            result: dict[str, Tensor] = {}
            for name in state:
                if name in self.shared:
                    result[name] = self._tensor(name, t, state[name])
                elif name not in self.tied:
                    result[name] = state[name].detach().clone()
            return {name: result[self.tied.get(name, name)] for name in state}

    def _tensor(self, name: str, t: int, base: Tensor) -> Tensor:
        out = torch.empty_like(base, memory_format=torch.contiguous_format)
        torch.ops.surgery_kernels.ties_merge_out(
            [base.detach()],
            [self.shared[name].to(base.device)],
            [1.0],
            lam=self.scales[t],
            semantics="exact",
            elect="none",
            reduce="sum",
            normalize=False,
            nonfinite="propagate",
            keep=[self.masks[name][t : t + 1].to(base.device)],
            names=[name],
            out=[out],
        )
        return out

    def _check(self, base: StateDict) -> None:
        for name, tensor in self.shared.items():
            if name not in base:
                raise ValueError(f"base must have the tensors that were packed, got no {name!r}")
            of_base = base[name]
            if (of_base.dtype, of_base.shape) != (tensor.dtype, tensor.shape):
                raise ValueError(
                    f"base[{name!r}] must be {tensor.dtype} {tuple(tensor.shape)}, "
                    f"got {of_base.dtype} {tuple(of_base.shape)}"
                )
            if not torch.equal(_samples(of_base).nan_to_num(), self.samples[name].nan_to_num()):
                raise ValueError(f"base must be the model that experts were packed with, got another {name!r}")
        for name, tensor in base.items():
            if tensor.is_floating_point() and name not in self.shared and name not in self.tied:
                raise ValueError(f"base must have the tensors that were packed, got also {name!r}")


def pack_experts(
    base: Model,
    experts: Mapping[str, Model],
    out: str | os.PathLike[str],
    *,
    method: str = "emr",
    **options: Any,
) -> PackedExperts:
    """Keeps experts as one shared model, a bit for every parameter of each, and a scale.

    Reads every model once, and takes little memory beside the pages of files that the system can drop at any time.

    Args:
        base: Pretrained model, a state dict or a checkpoint; integer buffers are not kept.
        experts: Fine-tuned models of the same tensors by the names of their tasks.
        out: File to write; it is complete or not there.
        method: "emr" or "tall_masks".
        **options: Of the method, but for its `task`.

    Raises:
        ValueError, TypeError, FileNotFoundError: the models differ, or an option is out of range; before any work.
        FileExistsError: `out` is there already.
        RuntimeError: NaN or infinity under ``nonfinite="error"``; names tensor, expert and count.
    """
    arguments.check_one_of("method", method, PACKABLE)
    path = Path(out)
    if path.exists():
        raise FileExistsError(f"out must not exist, got {os.fspath(out)!r}")
    packing = method_of(method, {**options, "task": 0})
    assert isinstance(packing, Packable)
    packing.check(len(experts))
    with _opened([base, *experts.values()]) as (of_base, *states):
        owner = owners_of(of_base, states, "base")
        floats = [name for name in of_base if of_base[name].is_floating_point()]
        names = sorted(name for name in floats if owner[name] == name)
        if not names:
            raise ValueError("base must have floating-point tensors, got none")
        facts = {"method": method, "tasks": [*experts], "tied": {x: owner[x] for x in floats if owner[x] != x}}
        partial = path.with_name(f"{path.name}.partial")
        with _file(partial, _contents(of_base, names, len(experts)), {KEY: json.dumps(facts)}) as tensors:
            scope = Scope(
                names=names,
                base=[of_base[name].detach() for name in names],
                experts=[[state[name].detach() for state in states] for name in names],
                out=[tensors[f"shared.{name}"] for name in names],
                owner={name: owner[name] for name in floats},
            )
            scales = packing.pack(scope, [tensors[f"masks.{name}"] for name in names])
            tensors["scales"].copy_(torch.tensor(scales, dtype=torch.float64))
            tensors["samples"].copy_(torch.cat([_samples(of_base[name]) for name in names]))
    os.replace(partial, path)
    fsync_folder(path.parent)
    return PackedExperts.open(path)


def _contents(base: StateDict, names: Sequence[str], num_tasks: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    contents: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"scales": (torch.float64, (num_tasks,))}
    contents["samples"] = (torch.float64, (sum(_num_samples(base[name]) for name in names),))
    for name in names:
        contents[f"shared.{name}"] = (base[name].dtype, tuple(base[name].shape))
        contents[f"masks.{name}"] = (torch.uint8, (num_tasks, -(-base[name].numel() // 8)))
    return contents


@contextmanager
def _opened(models: Sequence[Model]) -> Iterator[list[StateDict]]:
    """State dicts; those of checkpoints are views of their files, which stay open within."""
    with ExitStack() as stack:
        states: list[StateDict] = []
        first: Source | None = None
        for model in models:
            if isinstance(model, Mapping):
                states.append(model)
                continue
            source = open_checkpoint(model, base=first)  # what an adapter is added to
            stack.callback(source.close)
            first = source if first is None else first
            states.append({name: source.tensor(name) for name in source.tensors})
        yield states


@contextmanager
def _file(
    path: Path, contents: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Iterator[dict[str, Tensor]]:
    """Tensors that lie in a new file, on disk afterwards; without it where filling them fails."""
    layout = lay_out(
        contents, sum(prod(shape) * dtype.itemsize for dtype, shape in contents.values()) + 1, metadata=metadata
    )
    (shard,) = layout.shards
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        reserve(file, shard.nbytes)
        with mmap.mmap(file, shard.nbytes) as mapped:
            mapped[: len(shard.header)] = shard.header
            data = torch.frombuffer(mapped, dtype=torch.uint8)
            tensors = {
                name: data[place.offset : place.offset + place.nbytes].view(place.dtype).view(place.shape)
                for name, place in layout.places.items()
            }
            yield tensors
            mapped.flush()
            tensors.clear()
            del data
        os.fsync(file)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(file)


def _of(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the order of names, so that samples belong to them."""
    return {name.removeprefix(prefix): tensors[name] for name in sorted(tensors) if name.startswith(prefix)}


def _num_samples(tensor: Tensor) -> int:
    return min(tensor.numel(), SAMPLES)


def _samples(tensor: Tensor) -> Tensor:
    """Entries spread over a tensor.  # float64 [at most SAMPLES]"""
    count = _num_samples(tensor)
    return tensor.detach().reshape(-1)[:: max(1, tensor.numel() // max(1, count))][:count].double().cpu()
