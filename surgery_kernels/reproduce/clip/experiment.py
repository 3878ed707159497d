"""The experiment on CLIP: zero-shot accuracy of the experts, of their merges, and of the merges after surgery."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ...merging import entropy_objective, merge_state_dicts
from ...merging.methods.adamerging import Objective
from ...merging.progress import SECONDS_BEFORE_SHOWN
from ...surgery import attach, fit
from ..report import Accuracies, average, plot_averages, say, table
from .folders import InputError, Task, find_tasks
from .heads import TextHeads, check_head, read_head
from .images import Decoder, Images, Pixels, class_names, open_images
from .methods import MERGES, RANK, SURGERY
from .models import (
    PROJECTION,
    StateDict,
    VisionEncoder,
    image_processor,
    load_vision,
    logit_scale,
    vision_config,
    weight_files,
)
from .published import TASKS, recognise
from .settings import Settings

Encode = Callable[[Tensor, str], Tensor]  # images and the name of their task to features


class Experiment:
    """What all methods share: the tasks with their images and heads, the pretrained parameters, and one encoder.

    Merging holds all experts in memory; nothing else holds more than one.
    """

    def __init__(self, settings: Settings, out: Path) -> None:
        found = find_tasks(settings.model_dir, settings.data_dir, pretrained=settings.pretrained, wanted=settings.tasks)
        for path in found.without_images:
            say(f"{path} is left out: it has no images in {settings.data_dir}")
        for path in found.without_expert:
            say(f"{path} is left out: it has no expert in {settings.model_dir}")
        config = vision_config(found.pretrained)
        self.settings = settings
        self.tasks = found.tasks
        self.architecture = recognise(config.hidden_size, config.num_hidden_layers, config.patch_size)
        self.base = load_vision(found.pretrained)
        self.logit_scale = logit_scale(found.pretrained)
        self.encoder = VisionEncoder(config).eval().requires_grad_(False)
        self.encoder.to(device=settings.device)
        self.dtype = None if settings.autocast is None else getattr(torch, settings.autocast)
        models = [found.pretrained, *(task.expert for task in found.tasks)]
        self.folder = out / f"clip-{found.pretrained.name}-{self.fingerprint(models)}"
        self.features = out / "features" / found.pretrained.name

        text_heads = TextHeads(found.pretrained, out / "heads", templates=settings.templates, device=settings.device)
        self.heads: dict[str, Tensor] = {}  # [classes, num_features] each
        images = {task.name: self._open(task, text_heads) for task in self.tasks}
        decoder = Decoder(image_processor(found.pretrained), out / "pixels", settings.workers)
        self.splits: dict[str, dict[str, Pixels]] = {}
        for split in settings.splits:  # decoded last: it takes longest, and what is wrong is known by now
            self.splits[split] = {
                name: decoder.pixels(f"{name}-{split}", of_task[split], at_most=settings.max_images, seed=settings.seed)
                for name, of_task in images.items()
            }

    def _open(self, task: Task, text_heads: TextHeads) -> dict[str, Images]:
        """The splits of a task, with its head set up."""
        images = {split: open_images(task.images / split) for split in self.settings.splits}
        names = class_names(task.images, images["test"].class_names)
        saved = self.settings.heads
        head = text_heads.head(task.name, names) if saved is None else read_head(saved, task.name)
        self.heads[task.name] = check_head(head, task.name, len(names), len(self.base[PROJECTION]))
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        count = min(len(images["test"]), self.settings.max_images or len(images["test"]))
        say(f"{task.name}: {count} of {len(images['test'])} test images, {len(names)} classes ({shown})")
        return images

    def fingerprint(self, folders: Sequence[Path]) -> str:
        """Differs for any other setting, and for other weights in these folders."""
        files = [file for folder in folders for file in weight_files(folder)]
        weights = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return hashlib.sha256(json.dumps([weights, self.settings.as_json()]).encode()).hexdigest()[:12]

    @property
    def published(self) -> dict[str, float] | None:
        """Averages of the papers, where architecture and tasks are theirs."""
        same_tasks = {task.name for task in self.tasks} == set(TASKS)
        return self.architecture.averages if self.architecture is not None and same_tasks else None

    def table(self, accuracies: Accuracies) -> str:
        """The accuracies, with a column of the published averages where there are some."""
        published = {name: f"{value:.1f}" for name, value in (self.published or {}).items()}
        return table(accuracies, [task.name for task in self.tasks], {"published": published} if published else None)

    def accuracies(self) -> Iterator[tuple[str, list[float]]]:
        """Every method of the settings with its accuracy on each task, in percent, as soon as it is known."""
        methods = self.settings.methods
        if "pretrained" in methods:
            yield "pretrained", self.evaluate(self.plain(self.base))
        if "individual" in methods:
            yield "individual", [self.test(task, self.plain(self.expert(task))) for task in self.tasks]
        for name, options in MERGES.items():
            if options["method"] in methods:
                yield name, self.evaluate(self.plain(self.merge(options)))
                for mode, repair in SURGERY.items():
                    if mode in self.settings.surgery:
                        yield f"{name} + {repair}", self.evaluate_repaired(f"{options['method']}-{mode}", mode)

    def expert(self, task: Task) -> StateDict:
        return load_vision(task.expert, self.base)

    def merge(self, options: Mapping[str, Any]) -> StateDict:
        experts = [self.expert(task) for task in self.tasks]
        if options["method"] == "adamerging":
            options = {**options, "objective": self.entropy(), "steps": self.settings.adamerging_steps}
        with self.autocast():
            return merge_state_dicts(self.base, experts, **options)

    def entropy(self) -> Objective:
        """Of the predictions for unlabeled images of every task."""
        return entropy_objective(
            self.encoder,
            self.splits[self.settings.adapt_split],
            lambda features, task: self.logit_scale * cosines(features, self.heads[task]),
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
        )

    def plain(self, state: StateDict) -> Encode:
        """The encoder with the given parameters, whatever the task."""
        self.encoder.load_state_dict(state)
        return lambda images, task: self.encoder(images)

    def evaluate(self, encode: Encode) -> list[float]:
        return [self.test(task, encode) for task in self.tasks]

    @torch.no_grad()
    def test(self, task: Task, encode: Encode) -> float:
        """Percentage of the test images whose nearest prototype, by cosine, is that of their class."""
        device, batch_size = self.settings.device, self.settings.test_batch_size
        pixels, head = self.splits["test"][task.name], self.heads[task.name].to(device)
        correct = 0
        starts = range(0, len(pixels), batch_size)
        for start in tqdm(starts, desc=task.name, unit=" batches", leave=False, delay=SECONDS_BEFORE_SHOWN):
            rows = slice(start, start + batch_size)
            with self.autocast():
                features = encode(pixels.on(device, rows), task.name)
            predicted = cosines(features, head).argmax(-1)  # [batch]
            correct += int((predicted.cpu() == pixels.labels[rows]).sum())
        return 100 * correct / len(pixels)

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.settings.device).type, self.dtype, enabled=self.dtype is not None)

    def evaluate_repaired(self, name: str, mode: str) -> list[float]:
        """Fits adapters to the encoder as it is, from images without labels, saves and tests them."""
        settings = self.settings
        fitted = fit(
            self.encoder,
            {task.name: partial(self.expert, task) for task in self.tasks},
            self.splits[settings.adapt_split],
            mode,
            rank=self.rank(mode),
            steps=settings.steps,
            batch_size=settings.batch_size,
            seed=settings.seed,
            cache=self.features / mode,
            checkpoint=self.folder / f"{name}.checkpoint",
            autocast=self.dtype,
        )
        fitted.adapters.save(self.folder / f"{name}.safetensors")
        with attach(self.encoder, fitted.adapters) as surgery:
            return self.evaluate(lambda images, task: surgery(images, task=task))

    def rank(self, mode: str) -> int:
        if mode == "v1":
            return self.settings.rank
        return self.settings.v2_rank or (self.architecture.v2_rank if self.architecture else RANK)


def cosines(features: Tensor, head: Tensor) -> Tensor:
    """Of features [batch, num_features] and prototypes, which a saved head may scale: [batch, classes]."""
    return F.normalize(features.float(), dim=-1) @ head.T


def run(settings: Settings, out: Path) -> None:
    """Prints the table next to the published averages; writes it after each method, and a plot at the end."""
    check_device(settings)
    experiment = Experiment(settings, out)
    names = [task.name for task in experiment.tasks]
    architecture = experiment.architecture.name if experiment.architecture else "An unpublished CLIP"
    say(f"\n{architecture}, {len(names)} tasks; adapters see the {settings.adapt_split} images, never a label\n")

    folder = experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    accuracies: dict[str, list[float]] = {}
    for name, values in experiment.accuracies():
        accuracies[name] = values
        say(f"{name}: {average(values):.1f}")
        results = {
            "architecture": architecture,
            "settings": settings.as_json(),
            "accuracy": {method: dict(zip(names, of_method, strict=True)) for method, of_method in accuracies.items()},
            "average": {method: average(of_method) for method, of_method in accuracies.items()},
            "published average": experiment.published,
        }
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "results.txt").write_text(experiment.table(accuracies) + "\n")
    plot_averages(
        accuracies,
        folder / "average_accuracy.png",
        title=f"{architecture}: what merging costs and surgery gives back",
        label="zero-shot accuracy, average of the tasks (%)",
        published=experiment.published,
    )
    say(f"\n{experiment.table(accuracies)}")
    say(f"\nTable, plot and adapters are in {folder}")


def check_device(settings: Settings) -> None:
    try:
        device = torch.empty(0, device=settings.device).device
    except (AssertionError, RuntimeError):  # what builds without CUDA, and drivers without it, raise
        raise InputError(f"--device must be one that torch can use, got {settings.device}") from None
    if device.type != "cpu" and (settings.surgery or "adamerging" in settings.methods):
        raise InputError(f"--device must be cpu for surgery and adamerging, whose ops run there, got {settings.device}")
