"""What a user reads of a calibration."""

from __future__ import annotations

from collections.abc import Mapping

from .plan import CalibrationPlan


def perplexity_table(perplexities: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Rows of a heading and the experts; the merged model before and after, and the expert itself."""
    kinds = ("before", "after", "expert")
    names = perplexities["before"]
    return [
        ("perplexity", *kinds),
        *((name, *(f"{perplexities[kind][name]:.3f}" for kind in kinds)) for name in names),
    ]


def text_rows(plan: CalibrationPlan) -> list[tuple[str, str]]:
    """What the experts are given to read."""
    rows = [
        f"{of_expert.num_texts} of {name}, {of_expert.num_tokens} tokens with padding"
        for name, of_expert in plan.batches.items()
    ]
    return [("" if i else "texts", row) for i, row in enumerate(rows)]


def perplexity_rows(perplexities: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str]]:
    """The table with numbers under one another."""
    return [(name, "".join(f"{cell:>12}" for cell in cells)) for name, *cells in perplexity_table(perplexities)]
