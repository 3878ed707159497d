"""The files of a tokenizer with other tokens than it had."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..reading.files import read_json
from .tokens import ADDED, FAST, FORMATS, SETTINGS, SPECIAL, Tokens

# What belongs to a tokenizer, by name; the last ones hold its tokens a second time.
CHAT_TEMPLATE = "chat_template.jinja"
OF_A_TOKENIZER = (FAST, SETTINGS, SPECIAL, "chat_template*", "tokenization_*.py")
OF_ITS_TOKENS = (ADDED, "merges.txt", *(form.pattern for form in FORMATS))
DEFAULTS = {"single_word": False, "lstrip": False, "rstrip": False}  # of an added token

Files = Mapping[str, "Path | str | None"]  # by name: a file to copy, a text to write, or nothing to be there


def files_of(folder: Path, patterns: Collection[str] = (*OF_A_TOKENIZER, *OF_ITS_TOKENS)) -> dict[str, Path]:
    return {path.name: path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()}


def with_tokens(folder: Path, before: Tokens, after: Tokens) -> Files:
    """The files that change when a tokenizer loses tokens, or gets new ones behind those that it has.

    Args:
        folder: Where the tokenizer lies.
        before: Its tokens.
        after: What they should be; those of `before` that are still there have the ids that they had.

    Raises:
        ValueError: there is no tokenizer.json to write them into, or its numbers leave no room for new ones.
    """
    if not (folder / FAST).is_file():
        raise ValueError(
            f"{folder} must have a tokenizer.json for its tokens to be changed, got none: transformers' "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    content = read_json(folder / FAST)
    gone = before.ids.keys() - after.ids.keys()
    if gone:
        content["model"] = _without(content["model"], gone)
    written = {entry["content"]: entry for entry in content.get("added_tokens", ())}
    for token, options in after.added.items():
        written.setdefault(token, {"content": token, **options})
    entries = [_entry(token, after.ids[token], entry) for token, entry in written.items() if token in after.ids]
    content["added_tokens"] = sorted(entries, key=lambda entry: entry["id"])
    _check_numbers(folder, content)
    files: dict[str, Path | str | None] = dict.fromkeys(files_of(folder, OF_ITS_TOKENS))
    files[FAST] = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if (folder / SETTINGS).is_file():
        settings = read_json(folder / SETTINGS)
        if "added_tokens_decoder" in settings:
            decoder = {
                str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in content["added_tokens"]
            }
            files[SETTINGS] = _text({**settings, "added_tokens_decoder": decoder})
    return files


def with_template(folder: Path, template: str, files: Files) -> Files:
    """The files that change when a tokenizer gets a chat template, besides those that change already."""
    changed = {**dict.fromkeys(files_of(folder, ("chat_template*",))), **files, CHAT_TEMPLATE: template}
    settings = changed.get(SETTINGS, folder / SETTINGS)
    content = json.loads(settings) if isinstance(settings, str) else _read(settings)
    if content.pop("chat_template", None) is not None:
        changed[SETTINGS] = _text(content)
    return changed


def _read(path: Path | None) -> dict[str, Any]:
    return read_json(path) if path is not None and path.is_file() else {}


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def _entry(token: str, row: int, options: Mapping[str, Any]) -> dict[str, Any]:
    special = bool(options.get("special", False))
    known = {key: bool(options[key]) for key in (*DEFAULTS, "normalized") if key in options}
    return {"id": row, "content": token, **DEFAULTS, "normalized": not special, **known, "special": special}


def _without(model: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
    """The model of a tokenizer without some of its tokens, and without merges of and into them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, Mapping):
        kept: Any = {token: row for token, row in vocabulary.items() if token not in gone}
    else:
        kept = [entry for entry in vocabulary if entry[0] not in gone]
    changed = {**model, "vocab": kept}
    if "merges" in model:
        changed["merges"] = [merge for merge in model["merges"] if not _makes(merge) & set(gone)]
    return changed


def _makes(merge: str | list[str]) -> set[str]:
    """The two tokens of a merge, and the one that it makes of them."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return {first, second, first + second}


def _check_numbers(folder: Path, content: Mapping[str, Any]) -> None:
    """The tokenizers library numbers added tokens itself."""
    vocabulary = content["model"]["vocab"]
    own = dict(vocabulary) if isinstance(vocabulary, Mapping) else {entry[0]: i for i, entry in enumerate(vocabulary)}
    following = len(own)
    for entry in content["added_tokens"]:
        row = own.get(entry["content"], following)
        if row != entry["id"]:
            raise ValueError(
                f"{folder / FAST} must number its tokens without a gap for its tokens to be changed, got "
                f"{entry['content']!r} for {row} or {entry['id']}"
            )
        following = max(following, row + 1)
