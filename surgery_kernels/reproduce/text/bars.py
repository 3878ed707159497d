"""What the closed form is held to, from the rows of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..jobs import Job
from ..report import average
from .measure import Outcome
from .methods import MANY, SHOWN, SOME, closed_form, surgery_v2

CLOSE = 1.0  # points
FASTER = 10.0  # times


@dataclass(frozen=True)
class Bar:
    claim: str
    value: float
    wanted: float

    @property
    def holds(self) -> bool:
        return self.value >= self.wanted

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'FAILS':5}  {self.value:6.1f} >= {self.wanted:6.1f}  {self.claim}"


def bars(outcomes: Mapping[Job, Outcome], individual: Outcome) -> list[Bar]:
    """Of texts that no fit saw; none for rows that the run leaves out."""

    def held_out(setting: object, merge: str = SHOWN) -> float:
        return average(outcomes[Job(merge, setting)].held_out)  # type: ignore[arg-type]

    needed = [closed_form(SOME, 64), surgery_v2(SOME), surgery_v2(MANY)]
    if not all(Job(SHOWN, setting) in outcomes for setting in needed):
        return []
    ours, theirs = closed_form(SOME, 16), surgery_v2(SOME)
    seconds = [outcomes[Job(SHOWN, setting)].cpu_seconds for setting in (theirs, ours)]
    from_ties = max(held_out(closed_form(SOME, rank), "TIES") for rank in (16, "full"))
    return [
        Bar(f"{SHOWN}: rank 16 from {SOME} texts, and SurgeryV2 from the same", held_out(ours), held_out(theirs)),
        Bar(
            f"{SHOWN}: rank 64 from {SOME} texts, and SurgeryV2 from {MANY}",
            held_out(closed_form(SOME, 64)),
            held_out(surgery_v2(MANY)),
        ),
        Bar(f"TIES: {SOME} texts, and the experts less {CLOSE:g}", from_ties, average(individual.held_out) - CLOSE),
        Bar(
            f"times as fast as SurgeryV2 from {SOME} texts ({seconds[1]:.1f} and {seconds[0]:.1f} s of a processor)",
            seconds[0] / seconds[1],
            FASTER,
        ),
    ]
