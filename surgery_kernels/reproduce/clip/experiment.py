"""The experiment on CLIP: zero-shot accuracy of the experts, of their merges, and of the merges after surgery."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from tqdm import tqdm

from ...merging import METHODS, entropy_objective, merge_state_dicts
from ...merging.methods.learned import Objective
from ...merging.progress import SECONDS_BEFORE_SHOWN
from ...surgery import SurgeryModel
from ...surgery.seeds import generator
from ..errors import InputError
from ..repair import Setting, repair
from ..report import average, plot_averages, say, table
from ..zero_shot import cosines
from . import declared
from .folders import Task, find_tasks
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
from .published import TASKS, others, recognise
from .settings import Settings

Encode = Callable[[Tensor, str], Tensor]  # images and the name of their task to features


@dataclass(frozen=True)
class Outcome:
    """What a method comes to, in percent, one for every task."""

    accuracy: list[float]  # of all test images
    held_out: list[float] | None = None  # of those that the repair did not see, where it saw some of them


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

    def table(self, outcomes: Mapping[str, Outcome]) -> str:
        """The accuracies; where there are some, columns of the averages held out and of the published ones."""
        held_out = {name: f"{average(o.held_out):.1f}" for name, o in outcomes.items() if o.held_out}
        published = {name: f"{value:.1f}" for name, value in (self.published or {}).items()}
        more = {"held out": held_out, "published": published}
        accuracies = {name: outcome.accuracy for name, outcome in outcomes.items()}
        text = table(accuracies, [task.name for task in self.tasks], {key: x for key, x in more.items() if x})
        return "\n\n".join([text, *([others(self.architecture)] if self.published and self.architecture else [])])

    def outcomes(self) -> Iterator[tuple[str, Outcome]]:
        """Every method of the settings and what it comes to, as soon as it is known."""
        methods = self.settings.methods
        if "pretrained" in methods:
            yield "pretrained", self.evaluate(self.plain(self.base))
        if "individual" in methods:
            right = {task.name: self.test(task, self.plain(self.expert(task))) for task in self.tasks}
            yield "individual", outcome_of(right)
        for name, options in MERGES.items():
            if options["method"] in methods:
                yield name, self.evaluate(self.plain(self.merge(options)))
                for mode, repaired in SURGERY.items():
                    if mode in self.settings.surgery:
                        outcome = self.evaluate_repaired(f"{options['method']}-{mode}", self.setting(mode))
                        yield f"{name} + {repaired}", outcome
        for method in declared.names():
            if method in methods:
                yield method, self.evaluate_declared(method)

    def evaluate_declared(self, method: str) -> Outcome:
        experts = [self.expert(task) for task in self.tasks]
        states = declared.models(self.base, experts, method, self.inputs())
        right: dict[str, Tensor] = {}
        for task, state in zip(self.tasks, states, strict=True):
            right[task.name] = self.test(task, self.plain(state))
        return outcome_of(right)

    def inputs(self) -> declared.ClipInputs:
        pixels, drawn = self.splits[self.settings.adapt_split], self.drawn(self.settings.images)
        return declared.ClipInputs(
            encoder=self.encoder,
            experts=lambda: ((task.name, self.expert(task)) for task in self.tasks),
            images={task: torch.stack([pixels[task][int(i)] for i in rows]) for task, rows in drawn.items()},
            heads=self.heads,
            logit_scale=self.logit_scale,
            entropy=self.entropy,
            autocast=self.autocast,
            steps=self.settings.adamerging_steps,
        )

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

    def evaluate(self, encode: Encode, seen: Mapping[str, Tensor] | None = None) -> Outcome:
        """`seen`: by task the numbers of the test images that something was fitted to."""
        return outcome_of({task.name: self.test(task, encode) for task in self.tasks}, seen)

    @torch.no_grad()
    def test(self, task: Task, encode: Encode) -> Tensor:
        """For every test image whether the nearest prototype, by cosine, is that of its class.  # bool [images]"""
        device, batch_size = self.settings.device, self.settings.test_batch_size
        pixels, head = self.splits["test"][task.name], self.heads[task.name].to(device)
        right = []
        starts = range(0, len(pixels), batch_size)
        for start in tqdm(starts, desc=task.name, unit=" batches", leave=False, delay=SECONDS_BEFORE_SHOWN):
            rows = slice(start, start + batch_size)
            with self.autocast():
                features = encode(pixels.on(device, rows), task.name)
            predicted = cosines(features, head).argmax(-1)  # [batch]
            right.append(predicted.cpu() == pixels.labels[rows])
        return torch.cat(right)

    def autocast(self) -> torch.autocast:
        return torch.autocast(torch.device(self.settings.device).type, self.dtype, enabled=self.dtype is not None)

    def setting(self, mode: str) -> Setting:
        settings = self.settings
        if mode == "v1":
            return Setting("v1", settings.rank, settings.steps)
        if mode == "v2":
            return Setting("v2", self.deep_rank, settings.steps)
        if mode == "calibrate":
            return Setting("calibrate", num_samples=settings.images)
        return Setting(
            "v2",
            self.deep_rank,
            num_samples=settings.images,
            solver="closed_form",
            calibrated=mode == "calibrate+closed_form",
        )

    @property
    def deep_rank(self) -> int:
        return self.settings.v2_rank or (self.architecture.v2_rank if self.architecture else RANK)

    def evaluate_repaired(self, name: str, setting: Setting) -> Outcome:
        """Repairs the encoder as it is, from images without labels; saves what adapters there are, and tests."""
        settings = self.settings
        drawn = self.drawn(setting.num_samples)
        split = self.splits[settings.adapt_split]
        repaired = repair(
            self.encoder,
            self.base,
            {task.name: partial(self.expert, task) for task in self.tasks},
            {task: Subset(pixels, drawn[task].tolist()) if task in drawn else pixels for task, pixels in split.items()},
            setting,
            batch_size=settings.test_batch_size,
            autocast=self.dtype,
            progress=None,
            gradient={
                "batch_size": settings.batch_size,
                "seed": settings.seed,
                "cache": self.features / setting.mode,
                "checkpoint": self.folder / f"{name}.checkpoint",
            },
        )
        seen = drawn if settings.adapt_split == "test" else None
        if not isinstance(repaired, SurgeryModel):
            return self.evaluate(lambda images, task: repaired(images), seen)
        repaired.adapters.save(self.folder / f"{name}.safetensors")
        with repaired:
            return self.evaluate(lambda images, task: repaired(images, task=task), seen)

    def drawn(self, count: int | None) -> dict[str, Tensor]:
        """By task the numbers of `count` images; none where all are taken. Classes lie one after the other on disk."""
        split = self.splits[self.settings.adapt_split]
        if count is None:
            return {}
        return {
            task: torch.randperm(len(pixels), generator=generator(self.settings.seed, task, "images"))[:count]
            for task, pixels in split.items()
        }


def outcome_of(right: Mapping[str, Tensor], seen: Mapping[str, Tensor] | None = None) -> Outcome:
    """`right`: by task, for every test image; `seen`: the numbers of those that something was fitted to."""
    held_out = []
    for task, of_task in right.items():
        others = torch.ones(len(of_task), dtype=torch.bool)
        if seen:
            others[seen[task]] = False
        held_out.append(of_task[others])
    is_told = bool(seen) and all(len(of_task) for of_task in held_out)
    return Outcome(list(map(percent, right.values())), list(map(percent, held_out)) if is_told else None)


def percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


def run(settings: Settings, out: Path) -> None:
    """Prints the table next to the published averages; writes it after each method, and a plot at the end."""
    check_device(settings)
    experiment = Experiment(settings, out)
    names = [task.name for task in experiment.tasks]
    architecture = experiment.architecture.name if experiment.architecture else "An unpublished CLIP"
    say(f"\n{architecture}, {len(names)} tasks; adapters see the {settings.adapt_split} images, never a label\n")

    folder = experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    for name, outcome in experiment.outcomes():
        outcomes[name] = outcome
        say(f"{name}: {average(outcome.accuracy):.1f}")
        accuracies = {method: of_method.accuracy for method, of_method in outcomes.items()}
        held_out = {method: of_method.held_out for method, of_method in outcomes.items() if of_method.held_out}
        results = {
            "architecture": architecture,
            "settings": settings.as_json(),
            "accuracy": {method: dict(zip(names, of_method, strict=True)) for method, of_method in accuracies.items()},
            "average": {method: average(of_method) for method, of_method in accuracies.items()},
            "held out": {method: dict(zip(names, of_method, strict=True)) for method, of_method in held_out.items()},
            "published average": experiment.published,
        }
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "results.txt").write_text(experiment.table(outcomes) + "\n")
    plot_averages(
        {name: outcome.accuracy for name, outcome in outcomes.items()},
        folder / "average_accuracy.png",
        title=f"{architecture}: what merging costs and surgery gives back",
        label="zero-shot accuracy, average of the tasks (%)",
        published=experiment.published,
    )
    say(f"\n{experiment.table(outcomes)}")
    say(f"\nTable, plot and adapters are in {folder}")


def check_device(settings: Settings) -> None:
    try:
        device = torch.empty(0, device=settings.device).device
    except (AssertionError, RuntimeError):  # what builds without CUDA, and drivers without it, raise
        raise InputError(f"--device must be one that torch can use, got {settings.device}") from None
    learned = [name for name in settings.methods if name in METHODS and METHODS[name].from_inputs]
    if device.type != "cpu" and (settings.surgery or learned):
        raise InputError(f"--device must be cpu for surgery and adamerging, whose ops run there, got {settings.device}")
