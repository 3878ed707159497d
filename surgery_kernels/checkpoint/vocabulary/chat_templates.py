"""Chat templates: what the models have, and those that a recipe names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ..reading.files import read_json
from .tokenizer_files import CHAT_TEMPLATE
from .tokens import SETTINGS

SHORTEST = 20  # letters of a template; what is shorter is a name
LONGEST_NAME = 255


def template_for(wanted: str, folders: Sequence[Path]) -> str | None:
    """The template that a recipe asks for; None: the most frequent one is none.

    Args:
        wanted: A name of `TEMPLATES`, "auto" for the one that most models have, or the text itself.
        folders: Of all models, in the order of the recipe: of templates as frequent as others the first counts.

    Raises:
        ValueError: it is none of these.
    """
    if wanted == "auto":
        found = Counter(template for folder in folders if (template := template_of(folder)))
        return found.most_common(1)[0][0] if found else None
    if len(wanted) <= LONGEST_NAME and wanted in TEMPLATES:
        return _of_mergekit(wanted) or TEMPLATES[wanted]
    if len(wanted) < SHORTEST or "{" not in wanted:
        raise ValueError(
            f"recipe.chat_template must be auto, one of {', '.join(TEMPLATES)}, or a template, got {wanted!r}"
        )
    return wanted


def template_of(folder: Path) -> str | None:
    """What a tokenizer has, without blanks around it."""
    if (folder / CHAT_TEMPLATE).is_file():
        return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8").strip() or None
    template = read_json(folder / SETTINGS).get("chat_template") if (folder / SETTINGS).is_file() else None
    if isinstance(template, list):  # several, for tools and the like
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template.strip() or None if isinstance(template, str) else None


def _of_mergekit(name: str) -> str | None:
    """Its own text where it is installed, so that results are the same."""
    found = find_spec("mergekit")
    for place in (found.submodule_search_locations if found else None) or ():
        path = Path(place) / "_data" / "chat_templates" / f"{name}.jinja"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


TEMPLATES = {
    "alpaca": (
        "{% for message in messages %}"
        "{% if message.role == 'system' %}{{ message.content + '\\n\\n' }}"
        "{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message.content + '\\n\\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if loop.first and message.role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{{ '[|' + message.role + '|]' + message.content }}"
        "{{ '\\n' if message.role == 'user' else '[|endofturn|]\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ahead = namespace(text='') %}{% for message in messages %}"
        "{% if message.role == 'system' %}{% set ahead.text = message.content + '\\n\\n' %}"
        "{% elif message.role == 'user' %}{{ '[INST] ' + ahead.text + message.content + ' [/INST]' }}"
        "{% set ahead.text = '' %}"
        "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}
