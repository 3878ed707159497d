"""Sentences that a person can act on, each by a rule that is stated here with its number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from .inspection import Inspection
from .numbers import share, total

ALIKE = 0.98  # cosine from which two experts are nearly the same ...
LENGTHS_APART = 1.1  # ... if neither is longer than this times the other
APART = 0.1  # cosines all below which experts have little in common
FIGHTING = -0.2  # cosine from which on two experts undo one another
CONFLICT = 0.2  # lost share of a layer from which it conflicts ...
ABOVE_OTHERS = 1.3  # ... if it is this times that of the median layer
DOMINATES = 0.5  # share of the square of all changes ...
OF_PARAMETERS = 0.5  # ... in a kind that has less than this times that share of the parameters
LOUD = 3.0  # times the median length of the experts' changes
FAR = 0.5  # length of a change, of the base's
ODD = {"nonfinite": "NaN or infinite values", "saturated": "values at the limit of their dtype"}
UNTOUCHED = 0.5  # share of all entries from which on it is worth saying that an expert leaves them as they are


@dataclass(frozen=True)
class Finding:
    rule: str
    sentence: str


def findings(inspection: Inspection) -> list[Finding]:
    """What the numbers say, the most urgent first."""
    rules = (_odd_numbers, _nothing_changed, _pairs, _lengths, _layers, _kinds, _sparse, _missing)
    return [found for rule in rules for found in rule(inspection)] or [
        Finding("quiet", "nothing stands out: the experts change about as much as one another, and seldom conflict")
    ]


def _odd_numbers(of: Inspection) -> Iterator[Finding]:
    names = ["the base", *map(_expert, range(len(of.experts)))]
    for i, name in enumerate(names):
        for rule, what in (
            ("nonfinite", "NaN or infinite values"),
            ("saturated", "values at the limit of their dtype"),
        ):
            tensors = [t for t in of.tensors if getattr(t.numbers.census, rule)[i] > 0]
            count = int(getattr(of.whole.census, rule)[i])
            if tensors:
                where = f"{tensors[0].name}{f' and {len(tensors) - 1} more tensors' if len(tensors) > 1 else ''}"
                yield Finding(rule, f"{name} has {count} {what}, in {where}")


def _nothing_changed(of: Inspection) -> Iterator[Finding]:
    for t in _unchanged(of):
        yield Finding("unchanged", f"{_expert(t)} changes nothing: it is the base")


def _unchanged(of: Inspection) -> list[int]:
    return [t for t, changed in enumerate(of.whole.changed) if changed == 0]


def _pairs(of: Inspection) -> Iterator[Finding]:
    cosines, norms, products = of.whole.cosines, of.whole.norms, of.whole.products
    pairs = [(i, j) for j in range(len(norms)) for i in range(j) if norms[i] and norms[j]]
    for i, j in pairs:
        apart = (products[i, i] + products[j, j] - 2 * products[i, j]).item()
        longer = max(norms[i], norms[j]) / min(norms[i], norms[j])
        if apart <= 0:
            yield Finding("same", f"experts {i + 1} and {j + 1} are the same")
        elif cosines[i][j] >= ALIKE and longer <= LENGTHS_APART:
            yield Finding("alike", f"experts {i + 1} and {j + 1} are nearly the same (cosine {cosines[i][j]:.4f})")
        elif cosines[i][j] <= FIGHTING:
            undo = f"experts {i + 1} and {j + 1} undo one another (cosine {cosines[i][j]:.2f}): weigh one of them less"
            yield Finding("fighting", undo)
    if pairs and all(abs(cosines[i][j]) < APART for i, j in pairs):
        largest = max(abs(cosines[i][j]) for i, j in pairs)
        yield Finding(
            "apart",
            f"the experts have little in common (no cosine is above {largest:.3f}): their sum keeps most of each",
        )


def _lengths(of: Inspection) -> Iterator[Finding]:
    norms = [norm for norm in of.whole.norms if norm]
    for t, (norm, relative) in enumerate(zip(of.whole.norms, of.whole.relative, strict=True)):
        if len(norms) > 2 and norm > LOUD * median(norms):
            times = norm / median(norms)
            yield Finding("loud", f"{_expert(t)} changes {times:.1f} times as much as the others: weigh it less")
        if relative > FAR:
            yield Finding(
                "far", f"{_expert(t)} lies far from the base, {relative:.2f} of its length: was it tuned from it?"
            )


def conflicting_layers(of: Inspection) -> list[int]:
    """Those that lose at least CONFLICT of their change, and ABOVE_OTHERS times as much as the median layer."""
    lost = {layer: numbers.lost for layer, numbers in of.by_layer.items()}
    usual = median(lost.values()) if lost else 0.0
    return [layer for layer, value in lost.items() if value >= max(CONFLICT, ABOVE_OTHERS * usual)]


def _layers(of: Inspection) -> Iterator[Finding]:
    if len(of.by_layer) < 2:
        return
    usual = median(numbers.lost for numbers in of.by_layer.values())
    if found := conflicting_layers(of):
        lost = total(of.by_layer[layer] for layer in found).lost
        yield Finding(
            "conflict",
            f"conflict is in {_layers_in_words(found)}, where {lost:.0%} of the change goes against the rest of it "
            f"({usual:.0%} in the median layer): lower their density",
        )
    elif usual >= CONFLICT:
        everywhere = f"{usual:.0%} of the change goes against the rest of it in every layer"
        yield Finding("conflict", f"{everywhere}: trim it, or elect signs")


def _layers_in_words(layers: list[int]) -> str:
    """Runs of neighbours: "layers 3-5 and 9"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
    return f"layer{'s' * (len(layers) > 1)} {listed}"


def _kinds(of: Inspection) -> Iterator[Finding]:
    square = of.whole.products.trace().item()
    for kind, numbers in of.by_kind.items():
        of_change = share(numbers.products.trace().item(), square)
        of_parameters = share(numbers.numel, of.whole.numel)
        if len(of.by_kind) > 1 and of_change >= DOMINATES and of_parameters < OF_PARAMETERS * of_change:
            where = f"{of_change:.0%} of its square, in {of_parameters:.0%} of the parameters"
            yield Finding("dominates", f"the {kind} dominates the change: {where}")


def _sparse(of: Inspection) -> Iterator[Finding]:
    for t, changed in enumerate(of.whole.changed):
        if 0 < changed < 1 - UNTOUCHED:
            yield Finding("sparse", f"{_expert(t)} leaves {1 - changed:.0%} of the entries as they are")


def _missing(of: Inspection) -> Iterator[Finding]:
    for difference in of.differences:
        yield Finding(difference.kind, difference.sentence)


def _expert(t: int) -> str:
    return f"expert {t + 1}"
