"""The adapters of representation surgery: one per task and site."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import arguments, surgery_adapter
from .seeds import generator

Task = str | int | Tensor | Sequence[str | int]
Rank = int | str  # a number, or "full"

KINDS = ("relu", "linear")
METADATA = "surgery_adapters"  # the key of the configuration in a file
VERSION = 2  # of the file; those without one have relu adapters alone


class SurgeryAdapters(nn.Module):
    """``features - relu(features down^T) up^T``, with a `down` and an `up` of each task's own at every site.

    `down[i]` [num_tasks, rank, dim] and `up[i]` [num_tasks, dim, rank] belong to site i. `up` starts at zero: new
    adapters change nothing. Linear ones are without relu and have a `bias[i]` [num_tasks, dim] that is taken off too;
    where they are of full rank, `up[i]` is the identity, is not kept, and has no columns, and `down[i]` starts at zero.

    Args:
        num_tasks: 1 or more.
        widths: Width of the features of every site by name, in order of depth; the last site is the final
            representation. One site is surgery as first published (V1), all blocks and the final one are SurgeryV2.
        rank: 1 or more; one for all sites. Of linear adapters also "full", which any number from a site's width on is
            at that site.
        tasks: Names of the tasks; "0", "1", ... if none are given.
        dtype: Of the parameters: float64, float32, float16 or bfloat16.
        kind: "relu", as `fit` trains them, or "linear", as it solves for them.
        seed: `down` becomes a function of seed, name of the task and site; None draws it from torch's generator.

    Raises:
        ValueError: an argument is outside its range.

    Source: Representation Surgery (arXiv 2402.02705); SurgeryV2 (arXiv 2410.14389).
    """

    def __init__(
        self,
        num_tasks: int,
        widths: Mapping[str, int],
        rank: Rank,
        *,
        tasks: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        kind: str = "relu",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        arguments.check_count("num_tasks", num_tasks)
        arguments.check_one_of("kind", kind, KINDS)
        check_rank(rank, kind)
        if not widths:
            raise ValueError("widths must be of at least one site, got none")
        for site, width in widths.items():
            arguments.check_count(f"widths[{site!r}]", width)
        if dtype not in arguments.DTYPES:
            raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
        self.tasks = tuple(map(str, range(num_tasks) if tasks is None else tasks))
        if len(set(self.tasks)) != num_tasks or len(self.tasks) != num_tasks:
            raise ValueError(f"tasks must be {num_tasks} different names, got {list(self.tasks)}")
        self.widths = dict(widths)
        self.rank = rank
        self.kind = kind
        self.down, self.up, self.bias = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for dim in widths.values():
            full = kind == "linear" and (rank == "full" or int(rank) >= dim)
            self.down.append(torch.zeros(num_tasks, dim if full else int(rank), dim, dtype=dtype))
            self.up.append(torch.zeros(num_tasks, dim, 0 if full else int(rank), dtype=dtype))
            if kind == "linear":
                self.bias.append(torch.zeros(num_tasks, dim, dtype=dtype))
        self._draw(seed)

    @torch.no_grad()
    def _draw(self, seed: int | None) -> None:
        """kaiming_uniform with a = sqrt(5), as nn.Linear does, for each adapter alone."""
        for site, down in zip(self.sites, self.down, strict=True):
            bound = 1 / math.sqrt(down.shape[-1])
            if self.is_full(down):
                continue
            for task, of_task in zip(self.tasks, down, strict=True):
                of_task.uniform_(-bound, bound, generator=None if seed is None else generator(seed, task, site))

    def is_full(self, down: Tensor) -> bool:
        """Whether these are linear adapters of full rank, whose `up` is the identity."""
        return self.kind == "linear" and down.shape[-2] == down.shape[-1]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in order of depth; the last is the final representation."""
        return tuple(self.widths)

    @property
    def num_tasks(self) -> int:
        return len(self.tasks)

    @property
    def num_parameters(self) -> int:
        """Parameters of one task, summed over the sites: 2 * rank * dim, of linear adapters dim more; of full rank
        dim * dim + dim."""
        return sum(parameter.numel() for parameter in self.parameters()) // self.num_tasks

    def task_index(self, task: Task) -> int | Tensor:
        """The number of one task, or int64 [batch] for one task per sample, from names or numbers."""
        if isinstance(task, str):
            if task not in self.tasks:
                raise ValueError(f"task must be one of {', '.join(map(repr, self.tasks))}, got {task!r}")
            return self.tasks.index(task)
        if isinstance(task, Tensor):
            if task.dim() > 1 or task.dtype == torch.bool or task.is_floating_point() or task.is_complex():
                raise ValueError(f"task must be integers [batch], got {task.dtype} of shape {tuple(task.shape)}")
            index = task.long()
            least, most = index.aminmax() if index.numel() else (index.new_zeros(()),) * 2
            self._check_range(int(least))
            self._check_range(int(most))
            return index if index.dim() else int(index)
        if isinstance(task, Sequence):
            return torch.tensor([self.task_index(of_sample) for of_sample in task], dtype=torch.int64)
        if not isinstance(task, Integral):  # numpy's are
            raise TypeError(f"task must be a name, a number or one per sample, got {task!r}")
        return self._check_range(int(task))

    def _check_range(self, task: int) -> int:
        if not 0 <= task < self.num_tasks:
            raise ValueError(f"task must be in [0, {self.num_tasks}), got {task}")
        return task

    def forward(self, site: int, features: Tensor, tasks: slice | Tensor) -> Tensor:
        """Features [batch, dim] or [batch, tokens, dim] of a site, corrected, in the same layout.

        Args:
            site: Its position in `sites`.
            features: Any strides with the last one 1.
            tasks: Whose adapters. A slice: the batch is one group of equal size for each, in order; int64 [batch]:
                each sample's own.
        """
        down, up, options = self.factors(site)
        if isinstance(tasks, Tensor):
            return surgery_adapter(features, down, up, task_index=tasks, **options)
        of_tasks: dict[str, Any] = {name: x[tasks] if isinstance(x, Tensor) else x for name, x in options.items()}
        grouped = features.unflatten(0, (len(down[tasks]), -1))
        return surgery_adapter(grouped, down[tasks], up[tasks], **of_tasks).flatten(0, 1)

    def factors(self, site: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """`down` and `up` of a site as `surgery_adapter` takes them, and its options for this kind."""
        down, up = self.down[site], self.up[site]
        if self.kind == "relu":
            return down, up, {}
        if self.is_full(down):
            up = torch.eye(down.shape[-1], dtype=down.dtype, device=down.device).expand(len(down), -1, -1)
        return down, up, {"bias": self.bias[site], "activation": "none"}

    def extra_repr(self) -> str:
        kind = "" if self.kind == "relu" else f", kind={self.kind!r}"
        return f"tasks={list(self.tasks)}, sites={list(self.sites)}, rank={self.rank!r}{kind}"

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a safetensors file: the parameters, and the configuration as JSON in its metadata."""
        from safetensors.torch import save_file

        configuration = {
            "version": VERSION,
            "tasks": self.tasks,
            "widths": self.widths,
            "rank": self.rank,
            "kind": self.kind,
        }
        save_file(self.state_dict(), path, metadata={METADATA: json.dumps(configuration)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SurgeryAdapters:
        """Adapters on the CPU, as `save` wrote them."""
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA not in metadata:
                raise ValueError(f"path must be a file written by SurgeryAdapters.save, got {str(path)!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        configuration = {"version": 1, "kind": "relu", **json.loads(metadata[METADATA])}
        if configuration["version"] > VERSION:
            raise ValueError(
                f"path must be a file of version {VERSION} or before, got {configuration['version']}: it was written "
                "by a newer surgery_kernels"
            )
        tasks, widths, rank = configuration["tasks"], configuration["widths"], configuration["rank"]
        dtype, kind = tensors["down.0"].dtype, configuration["kind"]
        adapters = cls(len(tasks), widths, rank, tasks=tasks, dtype=dtype, kind=kind, seed=0)
        adapters.load_state_dict(tensors)
        return adapters


def check_rank(rank: object, kind: str) -> None:
    """A number from 1 on; of linear adapters also "full"."""
    if kind == "linear" and rank == "full":
        return
    if isinstance(rank, str):
        wanted = "'full' or an integer" if kind == "linear" else "an integer"
        raise TypeError(f"rank must be {wanted}, got {rank!r}")
    arguments.check_count("rank", rank)
