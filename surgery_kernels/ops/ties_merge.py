"""TIES: trim, elect a sign per parameter, average what agrees. One fused pass; no task vector is ever stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts, PerExpert

_ops = torch.ops.surgery_kernels


def check_options(
    num_tasks: int,
    *,
    density: PerExpert = 0.2,
    lam: float = 1.0,
    weights: PerExpert | None = None,
    semantics: str = "paper",
    elect: str = "sum",
    reduce: str = "mean",
    normalize: bool = True,
    rescale: bool = False,
    nonfinite: str = "error",
) -> dict[str, Any]:
    """The options of TIES, checked and as the op takes them."""
    arguments.check_one_of("semantics", semantics, arguments.SEMANTICS)
    arguments.check_one_of("elect", elect, arguments.ELECT)
    arguments.check_one_of("reduce", reduce, arguments.REDUCE)
    arguments.check_one_of("nonfinite", nonfinite, arguments.NONFINITE)
    if elect == "none" and semantics != "mergekit":
        raise ValueError(f"elect must be 'sum' or 'count' with semantics={semantics!r}, got 'none'")
    if reduce == "max" and semantics != "paper":
        raise ValueError(f"reduce must be 'mean' or 'sum' with semantics={semantics!r}, got 'max'")
    if semantics != "mergekit" and not normalize:
        raise ValueError(f"normalize must be True with semantics={semantics!r}, got False: use reduce='sum'")
    if semantics != "mergekit" and rescale:
        raise ValueError(f"rescale must be False with semantics={semantics!r}, got True")
    if semantics == "paper" and weights is not None:
        raise ValueError(f"weights must be None with semantics='paper', got {weights}")
    return {
        "density": arguments.check_density(density, num_tasks),
        "lam": arguments.check_lam(lam),
        "weights": None if weights is None else arguments.per_expert("weights", weights, num_tasks),
        "semantics": semantics,
        "elect": elect,
        "reduce": reduce,
        "normalize": bool(normalize),
        "rescale": bool(rescale),
        "nonfinite": nonfinite,
    }


def _check_thresholds(thresholds: Tensor | Sequence[float] | None, num_tasks: int) -> Tensor | None:
    if thresholds is None:
        return None
    if not isinstance(thresholds, Tensor):
        values = [arguments.number("thresholds", value, "a list of numbers") for value in thresholds]
        thresholds = torch.tensor(values, dtype=torch.float64)
    if thresholds.shape != (num_tasks,):
        raise ValueError(f"thresholds must have shape ({num_tasks},), got {tuple(thresholds.shape)}")
    if thresholds.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"thresholds must be float32 or float64, got {thresholds.dtype}")
    return thresholds.detach()


def ties_merge(
    base: Tensor | None,
    experts: Experts,
    *,
    density: PerExpert = 0.2,
    lam: float = 1.0,
    weights: PerExpert | None = None,
    semantics: str = "paper",
    elect: str = "sum",
    reduce: str = "mean",
    normalize: bool = True,
    rescale: bool = False,
    nonfinite: str = "error",
    thresholds: Tensor | Sequence[float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``base + lam * mean_t of the trimmed (expert_t - base) that agree with the elected sign``, per parameter.

    Bit-identical on every instruction set, thread count and split of the work. Reads the inputs twice (once where no
    threshold is to be found and `nonfinite` is not "error", three times with `rescale`) and writes once; inputs that
    are not contiguous are copied first.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16; None when `experts` already are
            task vectors: then the merged task vector is returned.
        experts: List of num_tasks >= 1 tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        density: Share of entries each expert keeps, in (0, 1], largest magnitudes first; one number or one per expert.
        lam: Scale of the merged task vector, finite.
        weights: One finite number, or one per expert. "mergekit" applies them before the election, "peft" after it;
            "paper" takes none.
        semantics: Whose TIES, bit for bit. "paper": every tie at the threshold is kept; where the election is a draw,
            the sign of the sum of all elected signs of this call decides. "mergekit", "peft": exactly the number kept
            stays, ties in flat index order; draws elect plus.
        elect: "sum" elects the sign of the summed entries, "count" the more frequent sign; "none" (mergekit only)
            lets every entry agree: with density 1 that is mergekit's `task_arithmetic`.
        reduce: "mean", "sum" or (paper only) "max" of the entries that agree.
        normalize: mergekit only: divide by the sum of the agreeing weights, without an election of all weights, unless
            that is 0 (below 1e-8).
        rescale: mergekit only: scale each trimmed task vector to the L1 norm it had before.
        nonfinite: What NaN or infinity in a task vector does: "error" raises before anything is written,
            "propagate" lets it take part (NaN always reaches the output), "drop" takes the entry as 0.
        thresholds: [num_tasks], 0 or greater, float32 or float64: keep ``abs(expert - base) >= thresholds``, compared
            in float32 (float64 for float64 inputs), instead of reading `density`.
        out: Tensor like `base` that receives the result; may be a memory-mapped file. It must not overlap an input.

    Returns:
        A tensor like `base`, or `out`. Carries no gradient. Empty for empty inputs.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
        RuntimeError: `out` overlaps an input or itself, a threshold is negative, or NaN or infinity under
            ``nonfinite="error"``; `out` is untouched.

    Source: TIES-Merging (arXiv 2306.01708), algorithm 1; mergekit 0.1.5 `ties`, `task_arithmetic`; PEFT `ties`.
    """
    base, experts = arguments.check_experts(base, experts)
    options = check_options(
        len(experts),
        density=density,
        lam=lam,
        weights=weights,
        semantics=semantics,
        elect=elect,
        reduce=reduce,
        normalize=normalize,
        rescale=rescale,
        nonfinite=nonfinite,
    )
    options["thresholds"] = _check_thresholds(thresholds, len(experts))
    if out is None:
        return _ops.ties_merge(base, experts, **options)
    arguments.check_like("out", out, experts[0], "experts[0]")
    _ops.ties_merge_out([] if base is None else [base], experts, **options, out=[out.detach()])
    torch.autograd.graph.increment_version(out)  # a graph that saved `out` must notice
    return out


def ties_split(
    base: Tensor | None,
    experts: Experts,
    *,
    density: PerExpert = 0.2,
    weights: PerExpert | None = None,
    semantics: str = "paper",
    elect: str = "sum",
    rescale: bool = False,
    nonfinite: str = "error",
    thresholds: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """The trimmed entries of every expert that agree with the elected sign, 0 elsewhere.

    Their sum over the experts, in order, is what ``ties_merge(..., reduce="sum")`` scales and adds to the base (with
    "peft" weights in 16 bits, up to the rounding of each entry).
    AdaMerging++ learns one coefficient for each of them.

    Args:
        base, experts, density, weights, semantics, elect, rescale, nonfinite, thresholds: As in `ties_merge`; weights
            are multiplied in.

    Returns:
        [num_tasks, \\*shape] in the dtype of the inputs. Carries no gradient.

    Raises:
        As `ties_merge`.

    Source: AdaMerging (arXiv 2310.02575), section 3.2; TIES-Merging (arXiv 2306.01708), algorithm 1.
    """
    base, experts = arguments.check_experts(base, experts)
    options = check_options(
        len(experts),
        density=density,
        weights=weights,
        semantics=semantics,
        elect=elect,
        rescale=rescale,
        nonfinite=nonfinite,
    )
    for summing in ("lam", "reduce", "normalize"):
        del options[summing]
    return _ops.ties_split(base, experts, **options, thresholds=_check_thresholds(thresholds, len(experts)))


@torch.library.register_fake("surgery_kernels::ties_merge")
def _(base: Tensor | None, experts: Sequence[Tensor], *_: object, **__: object) -> Tensor:
    return experts[0].new_empty(experts[0].shape)


@torch.library.register_fake("surgery_kernels::ties_split")
def _(base: Tensor | None, experts: Sequence[Tensor], *_: object, **__: object) -> Tensor:
    return experts[0].new_empty((len(experts), *experts[0].shape))


@torch.library.register_fake("surgery_kernels::ties_merge_out")
def _(*_: object, **__: object) -> None:
    return None
