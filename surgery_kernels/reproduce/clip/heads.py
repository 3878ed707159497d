"""Zero-shot heads: a prototype per class, from sentences or from a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from ..errors import InputError
from .models import text_encoder, weight_files
from .published import canonical
from .templates import DEFAULT, TEMPLATES


class TextHeads:
    """Heads from the text encoder of a CLIPModel, which is loaded when the first one is not in `cache`."""

    def __init__(self, pretrained: Path, cache: Path, *, templates: Path | None = None, device: str = "cpu") -> None:
        self.pretrained, self.cache, self.device = pretrained, cache, device
        self.templates = TEMPLATES if templates is None else read_templates(templates)
        self._loaded: tuple[nn.Module, Any] | None = None

    def head(self, task: str, class_names: Sequence[str]) -> Tensor:
        """The head of a task, float32 [classes, num_features]."""
        templates = self.templates.get(task, DEFAULT)
        weights = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weight_files(self.pretrained)]
        settings = json.dumps([str(self.pretrained.resolve()), weights, templates, list(class_names)])
        path = self.cache / f"{task}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.safetensors"
        if not path.exists():
            if self._loaded is None:
                tokenizer = AutoTokenizer.from_pretrained(self.pretrained)
                self._loaded = text_encoder(self.pretrained).to(self.device), tokenizer
            encoder, tokenizer = self._loaded
            self.cache.mkdir(parents=True, exist_ok=True)
            save_file({task: head_from_text(encoder, tokenizer, class_names, templates)}, path)
        return load_file(path)[task]


@torch.no_grad()
def head_from_text(encoder: nn.Module, tokenizer: Any, class_names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """``normalize(mean over templates of normalize(encode(template with the class)))``: [classes, num_features].

    Source: CLIP (arXiv 2103.00020), section 3.1.4.
    """
    device = next(encoder.parameters()).device
    rows = []
    for name in class_names:
        sentences = [template.replace("{}", name) for template in templates]
        tokens = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(device)
        embedded = encoder(**tokens).text_embeds  # [templates, num_features]
        rows.append(F.normalize(F.normalize(embedded, dim=-1).mean(0), dim=-1))
    return torch.stack(rows).cpu()


def read_templates(path: Path) -> dict[str, list[str]]:
    """A JSON object: task -> list of sentences with `{}` for the class.

    Raises:
        InputError: it is something else.
    """
    try:
        templates = json.loads(path.read_text(encoding="utf-8"))
        valid = all(templates.values()) and all("{}" in text for texts in templates.values() for text in texts)
    except (OSError, ValueError, AttributeError, TypeError):
        valid = False
    if not valid:
        raise InputError(f"--templates must be a JSON file of lists of sentences with {{}} by task, got {path}")
    return {canonical(task): texts for task, texts in templates.items()}


def read_head(path: Path, task: str) -> Tensor:
    """A saved head [classes, num_features], taken as it is, not normalised.

    Args:
        path: A safetensors file with a tensor per task, or a folder with ``<task>.safetensors`` or ``<task>.pt`` each.
        task: Its name.

    Raises:
        InputError: the task has no head there.
    """
    if path.is_dir():
        saved = {canonical(file.stem): file for file in path.iterdir() if file.suffix in (".safetensors", ".pt")}
        if task not in saved:
            raise InputError(f"--heads must hold {task}.safetensors or {task}.pt, got none in {path}")
        head = read_tensor(saved[task])
    else:
        if path.suffix != ".safetensors" or not path.is_file():
            raise InputError(f"--heads must be a safetensors file or a folder, got {path}")
        heads = {canonical(name): tensor for name, tensor in load_file(path).items()}
        if task not in heads:
            raise InputError(f"--heads must hold a tensor for every task, got {', '.join(sorted(heads))}, not {task}")
        head = heads[task]
    return head.float()


def read_tensor(file: Path) -> Tensor:
    """The only tensor of a file."""
    if file.suffix == ".safetensors":
        content = load_file(file)
    else:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # a module, which may run code, or bytes that unpickling trips over in its own way
            content = None
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise InputError(f"{file} must hold one tensor [classes, num_features], got something else")
    return tensors[0]


def check_head(head: Tensor, task: str, num_classes: int, num_features: int) -> Tensor:
    """The head itself, if it fits the images and the encoder."""
    if head.shape != (num_classes, num_features):
        raise InputError(
            f"the head of {task} must be [classes, num_features] of shape {[num_classes, num_features]}, "
            f"got {list(head.shape)}"
        )
    return head
