"""What surgery gives back on the digits, trained in full, over seeds and merges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest

from surgery_kernels.reproduce.digits import experiment as digits
from surgery_kernels.reproduce.digits.experts import Config, load_experts
from surgery_kernels.reproduce.digits.measure import Outcome, run_job
from surgery_kernels.reproduce.digits.merges import merge
from surgery_kernels.reproduce.jobs import Job, processes
from surgery_kernels.reproduce.report import average

pytestmark = pytest.mark.any_isa

MERGED = {0: ("weight averaging", "task arithmetic", "TIES"), 1: ("task arithmetic",), 2: ("TIES",)}  # by seed
BY_GRADIENT = (1, "task arithmetic")  # what V2 corrects by steps, which takes longest by far
IN_EVERY_SEED = ("task arithmetic", "closed form")

Outcomes = Mapping[str, Outcome]  # by repair; "" is the merge itself


def jobs(seed: int) -> Iterator[tuple[str, str]]:
    """Merges and repairs, those that take long first."""
    for name in MERGED[seed]:
        for repair in sorted(["", *digits.SURGERIES], key="SurgeryV2".__ne__):
            if repair != "SurgeryV2" or (seed, name) == BY_GRADIENT:
                yield name, repair
    if IN_EVERY_SEED[0] not in MERGED[seed]:
        yield IN_EVERY_SEED


def check_bands(of: Outcomes, individual: float) -> None:
    rising = [average(of[repair].accuracy) for repair in ("", "Surgery", "Surgery, rank 52")]
    assert rising == sorted(rising), rising
    merged, v1, closed, calibrated = (of[repair] for repair in ("", "Surgery", "closed form", "calibrate"))
    assert average(closed.accuracy) > rising[2] and closed.final_bias < 0.35 * merged.final_bias
    assert average(calibrated.accuracy) > rising[0] + 2 and calibrated.final_bias < merged.final_bias
    assert average(of["calibrate, residual"].accuracy) > average(calibrated.accuracy) + 5
    assert average(of["calibrate, adapters"].accuracy) > rising[2]
    assert v1.final_bias < 0.55 * merged.final_bias
    for site, bias in merged.bias.items():
        assert site == "" or v1.bias[site] == bias, site
    by_depth = list(merged.bias.values())
    assert by_depth == sorted(by_depth), by_depth
    if "SurgeryV2" in of:
        v2 = of["SurgeryV2"]
        assert average(v2.accuracy) >= rising[2] and average(v2.accuracy) - rising[1] > 0.5, rising
        assert average(v2.accuracy) >= individual - 2, (rising, individual)
        assert v2.final_bias < 0.35 * merged.final_bias
        for site, bias in merged.bias.items():
            assert v2.bias[site] < 0.5 * bias, site


@pytest.mark.slow
def test_surgery_repairs_in_every_seed(tmp_path: Path) -> None:
    """Every merge in one seed, one merge in each of two others."""
    configs = {seed: Config(seed=seed, multi_task_steps=1) for seed in MERGED}  # nothing here is for that encoder
    folders = {seed: tmp_path / str(seed) for seed in MERGED}
    with processes() as pool:
        trained = {seed: pool.submit(load_experts, config, folders[seed]) for seed, config in configs.items()}
        running: dict[tuple[int, str, str], Future[Outcome]] = {}
        for seed, config in configs.items():
            made = trained[seed].result()
            for name, repair in jobs(seed):
                job = Job(name, digits.SURGERIES.get(repair))
                running[seed, name, repair] = pool.submit(run_job, config, folders[seed], job, merge(made, name))
        of_experts = [pool.submit(digits.individual, later.result()) for later in trained.values()]
        individual = {seed: average(later.result().accuracy) for seed, later in zip(MERGED, of_experts, strict=True)}
        outcomes = {what: later.result() for what, later in running.items()}
    for seed, names in MERGED.items():
        for name in names:
            of_merge = {repair: outcome for (s, n, repair), outcome in outcomes.items() if (s, n) == (seed, name)}
            check_bands(of_merge, individual[seed])
    by_gradient, in_closed_form = (outcomes[(*BY_GRADIENT, repair)] for repair in ("SurgeryV2", "closed form"))
    ratio = by_gradient.cpu_seconds / in_closed_form.cpu_seconds
    assert ratio >= 50, ratio  # of one processor, whatever else the machine does: 194 where it was measured
    closed_form = [average(outcomes[(seed, *IN_EVERY_SEED)].accuracy) for seed in MERGED]
    # 92.4 where it was measured; training ends a few tenths away on other processors
    assert average(closed_form) >= 92.0, closed_form
