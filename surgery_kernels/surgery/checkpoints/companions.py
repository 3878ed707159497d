"""The files beside the weights of a calibrated model: the merged one's, with a paragraph more in its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ... import _C
from ...checkpoint.reading.companions import CARD, companions
from ...checkpoint.reading.source import Source
from ...checkpoint.writing.durable import copy_file, fsync_folder, make_folders, write_text
from ...checkpoint.writing.layout import Layout
from .plan import CalibrationPlan
from .summary import perplexity_table


def write_companions(
    folder: Path,
    plan: CalibrationPlan,
    source: Source,
    layout: Layout,
    perplexities: Mapping[str, Mapping[str, float]],
) -> None:
    """Everything of the result besides the weights; the same bytes for the same plan."""
    files = companions(source).files
    for file, path in files.items():
        make_folders(folder, file)
        copy_file(path, folder / file)
    for file, text in layout.indices().items():
        write_text(folder / file, text)
    card = files[CARD].read_text(encoding="utf-8") if CARD in files else f"# {source.name}\n"
    write_text(folder / CARD, f"{card.rstrip()}\n\n{_paragraph(plan, perplexities)}")
    for above in {(folder / file).parent for file in (CARD, *files)}:
        fsync_folder(above)


def _paragraph(plan: CalibrationPlan, perplexities: Mapping[str, Mapping[str, float]]) -> str:
    how = plan.how
    texts = ", ".join(f"{of_expert.num_texts} of {name}" for name, of_expert in plan.batches.items())
    heading, *rows = (f"| {' | '.join(row)} |" for row in perplexity_table(perplexities))
    return (
        f"Calibrated by surgery_kernels {_C.build_info()['version']} (FeatCal, arXiv 2605.13030) on texts of its "
        f"experts: {texts}; lam {how.lam:g}, anchor {how.anchor:g}, teacher {how.teacher:g}, "
        f"{'residual targets' if how.residual else 'published targets'}, {how.order} by {how.order}.\n\n"
        f"{heading}\n|---|---:|---:|---:|\n" + "\n".join(rows) + "\n"
    )
