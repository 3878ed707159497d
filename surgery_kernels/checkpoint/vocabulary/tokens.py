"""The tokens of a model and their ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

from ..reading.files import read_json
from .formats import Reader, read_numbered, read_sentencepiece, read_tekken, read_tiktoken, read_words

FAST = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"
SPECIAL = "special_tokens_map.json"
# The names of the special tokens of a tokenizer, in the order in which transformers adds those that are missing.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_ROLES = ("additional_special_tokens", "extra_special_tokens")

# Classes of transformers and of custom code whose ids are those of the file; others move them, or add to them in code.
OF_WORDS = (
    "Bert", "BertJapanese", "ConvBert", "DPRContextEncoder", "DPRQuestionEncoder", "DPRReader", "DistilBert", "Electra",
    "Esm", "Funnel", "LayoutLM", "LayoutLMv2", "Lxmert", "MPNet", "MobileBert", "RoFormer", "Splinter", "SqueezeBert",
)  # fmt: skip
OF_NUMBERS = (
    "Bart", "Blenderbot", "BlenderbotSmall", "CLIP", "CTRL", "CodeGen", "Deberta", "GPT2", "LED", "LayoutLMv3",
    "Longformer", "Marian", "MVP", "OpenAIGPT", "Qwen2", "Roberta", "Whisper", "XLM",
)  # fmt: skip
OF_PIECES = ("Albert", "Baichuan", "CodeLlama", "Gemma", "InternLM", "InternLM2", "Llama", "Mistral", "XLNet", "Yi")
OF_BYTES = ("Kimi", "TikToken", "Llama")


@dataclass(frozen=True)
class Format:
    """Files without tokenizer.json, and who reads them as they are."""

    pattern: str
    read: Reader
    classes: tuple[str, ...]


FORMATS = (
    Format("tekken.json", read_tekken, ()),
    Format("vocab.json", read_numbered, OF_NUMBERS),
    Format("vocab.txt", read_words, OF_WORDS),
    Format("*.tiktoken", read_tiktoken, OF_BYTES),
    Format("tiktoken.model", read_tiktoken, OF_BYTES),
    Format("*.model", read_sentencepiece, OF_PIECES),
)
# What tells that there is a tokenizer.
TRACES = (FAST, SETTINGS, ADDED, SPECIAL, "vocab*", "merges.txt", "tokenization_*.py", *(f.pattern for f in FORMATS))


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer knows."""

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # besides its model: their settings
    unlisted: frozenset[str] = frozenset()  # those that stand nowhere but in a role, such as that of the pad_token

    @property
    def num_rows(self) -> int:
        """That a tensor needs with a row for each."""
        return 1 + max(self.ids.values(), default=-1)

    def below(self, limit: int) -> Tokens:
        """Those with a row among so many."""
        ids = {token: row for token, row in self.ids.items() if row < limit}
        return Tokens(ids, {token: options for token, options in self.added.items() if token in ids})


def has_tokenizer(folder: Path | None) -> bool:
    return folder is not None and any(path.is_file() for pattern in TRACES for path in folder.glob(pattern))


def read_tokens(folder: Path) -> Tokens:
    """The tokens of the tokenizer in a folder, as transformers numbers them.

    Raises:
        ValueError: it is of a kind that is not read here, or its files are not what they should be.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if (folder / FAST).is_file():
        tokens = _read_fast(folder / FAST)
    else:
        path, read = _slow(folder, settings)
        try:
            tokens = _Growing(read(path))
        except (AttributeError, LookupError, TypeError, ValueError):
            raise ValueError(f"{path} must hold tokens as its name says, got something else") from None
    for token, row, options in _written_beside(folder, settings):
        tokens.add(token, row if not (folder / FAST).is_file() else None, options)
    listed = set(tokens.ids)
    for special in _special(folder, settings):
        options = special if isinstance(special, Mapping) else {"content": special}
        tokens.add(str(options.get("content")), None, {"special": True, "normalized": False, **options})
    if not tokens.ids:
        raise ValueError(f"{folder} must have a tokenizer with tokens, got none")
    return Tokens(tokens.ids, tokens.added, frozenset(tokens.ids.keys() - listed))


class _Growing:
    """Tokens to which others are added, numbered as the tokenizers library does."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        self.added: dict[str, Mapping[str, Any]] = {}
        self._num_own = len(ids)
        self._last = -1  # of the added
        self._owner = {row: token for token, row in ids.items()}

    def add(self, token: str, row: int | None, options: Mapping[str, Any]) -> int:
        """Its id: the one it has, else `row`, else the next."""
        if token not in self.ids:
            if row is None:
                row = max(self._num_own, self._last + 1)
            elif row in self._owner:
                del self.ids[self._owner[row]]  # a place that was kept for it
            self.ids[token] = row
            self._owner[row] = token
        self.added.setdefault(token, {key: options[key] for key in OPTIONS if key in options})
        self._last = max(self._last, self.ids[token])
        return self.ids[token]


OPTIONS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


def _read_fast(path: Path) -> _Growing:
    """tokenizer.json: the vocabulary of the model in it, and what was added."""
    content = read_json(path)
    try:
        vocabulary = content.get("model", {}).get("vocab", {})
        if not isinstance(vocabulary, Mapping):  # Unigram lists pairs of token and score
            vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
        tokens = _Growing({token: index(row) for token, row in vocabulary.items()})
        for entry in content.get("added_tokens", ()):
            row, written = tokens.add(entry["content"], None, entry), index(entry["id"])
            if row != written:
                raise ValueError(
                    f"{path} must number {entry['content']!r} as the tokenizers library does, {row}, got {written}"
                )
    except (AttributeError, LookupError, TypeError):
        raise ValueError(f"{path} must hold tokens and their ids as the tokenizers library writes them") from None
    return tokens


def _slow(folder: Path, settings: Mapping[str, Any]) -> tuple[Path, Reader]:
    """The file of the vocabulary, and what reads it."""
    kind = _class(folder, settings)
    found = [(path, form) for form in FORMATS for path in sorted(folder.glob(form.pattern))]
    two = (folder / "target_vocab.json").is_file()  # Marian's, of two languages
    for path, form in () if two else found:
        if not form.classes or kind in form.classes:
            if form.read is read_tiktoken and "added_tokens_decoder" not in settings:
                break  # its special tokens stand in code
            return path, form.read
    have = ", ".join(dict.fromkeys(path.name for path, _ in found)) or "no vocabulary"
    of_class = f" of the class {kind}Tokenizer" if kind else ""
    raise ValueError(
        f"{folder} must have a tokenizer.json for its tokens to be known, got {have}{of_class}: transformers' "
        f"AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
    )


def _class(folder: Path, settings: Mapping[str, Any]) -> str:
    """Of the tokenizer, without "Tokenizer" and "Fast" behind it; "" where nothing tells."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if isinstance(name, str):
        return name.removesuffix("Fast").removesuffix("Tokenizer")
    known = {name.lower(): name for form in FORMATS for name in form.classes}
    of_model = str(config.get("model_type", "")).replace("-", "").replace("_", "")
    return known.get({"mixtral": "llama"}.get(of_model, of_model), "")


def _written_beside(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Added tokens that stand in other files than that of the vocabulary."""
    decoder = settings.get("added_tokens_decoder")
    if decoder is None and (folder / ADDED).is_file():
        written = read_json(folder / ADDED)
        decoder = {row: {"content": token} for token, row in written.items()}
    try:
        rows = {int(row): options for row, options in (decoder or {}).items()}
        yield from ((rows[row]["content"], row, rows[row]) for row in sorted(rows))
    except (AttributeError, LookupError, TypeError, ValueError):
        raise ValueError(f"{folder} must have added tokens by their ids in {SETTINGS} or {ADDED}") from None


def _special(folder: Path, settings: Mapping[str, Any]) -> Iterator[str | Mapping[str, Any]]:
    """Tokens with a role, which a tokenizer knows even if its vocabulary does not."""
    roles = dict(settings)
    if "added_tokens_decoder" not in settings and (folder / SPECIAL).is_file():
        roles |= read_json(folder / SPECIAL)
    for role in ROLES:
        if roles.get(role):
            yield roles[role]
    for role in MORE_ROLES:
        if isinstance(more := roles.get(role), list):
            yield from more
