"""What a user should know about the tokens of a merge before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .result import ResultTokenizer
from .sizes import numbers_in
from .tokenizer_files import OF_ITS_TOKENS, files_of
from .tokens import FAST, Tokens

SHOWN = 3  # tokens in a sentence


def without_rows(model: str, tokens: Tokens, num_rows: int) -> Iterator[str]:
    """A tokenizer that knows more than its model."""
    if beyond := [token for token, row in tokens.ids.items() if row >= num_rows]:
        yield f"{model} has {num_rows} rows and no row for {_some(beyond)}, which its tokenizer knows"


def other_number(donor: str, before: int, after: int, result: ResultTokenizer) -> Iterator[str]:
    """Rows that the tensors of the donor lose or get."""
    if before != after:
        padding = after - len(result.tokens.ids)
        of_them = f", {padding} of them without a token" if padding else ""
        yield f"the result has {after} rows for tokens{of_them}, {donor} has {before}"


def other_rows(donor: str, ours: Tokens, model: str, theirs: Tokens) -> Iterator[str]:
    """Tokens that have rows of different numbers where rows are merged by their numbers."""
    if moved := [token for token, row in ours.ids.items() if theirs.ids.get(token, row) != row]:
        yield (
            f"{model} has other rows than {donor} for {_some(moved)}, and rows are merged by their numbers: "
            f"tokenizer_source: base merges them by token"
        )


def moved_ids(config: Mapping[str, Any], before: Tokens, after: Tokens) -> Iterator[str]:
    """Ids in the configuration of the donor, which the result keeps, that mean another token than they did."""
    was, now = ({row: token for token, row in tokens.ids.items()} for tokens in (before, after))
    for path, row in numbers_in(config):
        if path[-1].endswith(("token_id", "token_index")) and was.get(row) != now.get(row) and row in was:
            yield (
                f"config.json has {'.'.join(path)} {row}, which was {was[row]!r} and is {now.get(row)!r} in the "
                f"tokenizer of the result"
            )


def same_files(folders: Sequence[Path]) -> bool:
    """Whether all tokenizers are the same, whatever is in them."""
    contents = [
        {name: path.read_bytes() for name, path in files_of(folder, (FAST, *OF_ITS_TOKENS)).items()}
        for folder in folders
    ]
    return all(content == contents[0] for content in contents[1:])


def _some(tokens: Sequence[str]) -> str:
    shown = ", ".join(map(repr, tokens[:SHOWN]))
    more = len(tokens) - SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def truncated(name: str, before: int, after: int, donor: str) -> str:
    """`name`: Of a tensor of the result, which has `after` rows."""
    return (
        f"unsafe: {name!r} has {after} rows instead of {before}, and config.json stays that of {donor}: merge by token "
        "(tokenizer_source: base) for a model that can be loaded"
    )
