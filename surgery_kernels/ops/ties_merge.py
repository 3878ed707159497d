"""TIES: trim, elect a sign per parameter, average what agrees. One fused pass; no task vector is ever stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import arguments
from .arguments import Experts, PerExpert
from .masks import check_ids, check_seed, pack

_ops = torch.ops.surgery_kernels

SCALED = ("mergekit", "exact")  # semantics that scale entries before they are summed


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
    if reduce in ("magmax", "unique") and (semantics != "exact" or elect != "none"):
        raise ValueError(
            f"semantics and elect must be 'exact' and 'none' with reduce={reduce!r}, got {semantics!r} and {elect!r}"
        )
    if elect == "none" and semantics not in SCALED:
        raise ValueError(f"elect must be 'sum' or 'count' with semantics={semantics!r}, got 'none'")
    if reduce == "max" and semantics != "paper":
        raise ValueError(f"reduce must be 'mean' or 'sum' with semantics={semantics!r}, got 'max'")
    if semantics not in SCALED and not normalize:
        raise ValueError(f"normalize must be True with semantics={semantics!r}, got False: use reduce='sum'")
    if reduce == "unique" and not normalize:
        raise ValueError("normalize must be True with reduce='unique', got False")
    if semantics not in SCALED and rescale:
        raise ValueError(f"rescale must be False with semantics={semantics!r}, got True")
    if reduce in ("magmax", "unique") and weights is not None:
        raise ValueError(f"weights must be None with reduce={reduce!r}, got {weights}")
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


def _check_thresholds(
    thresholds: Tensor | Sequence[float] | None, num_tasks: int, argument: str = "thresholds"
) -> Tensor | None:
    if thresholds is None:
        return None
    if not isinstance(thresholds, Tensor):
        values = [arguments.number(argument, value, "a list of numbers") for value in thresholds]
        thresholds = torch.tensor(values, dtype=torch.float64)
    if thresholds.shape != (num_tasks,):
        raise ValueError(f"{argument} must have shape ({num_tasks},), got {tuple(thresholds.shape)}")
    if thresholds.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{argument} must be float32 or float64, got {thresholds.dtype}")
    return thresholds.detach()


def _check_narrowing(
    experts: Sequence[Tensor],
    options: dict[str, Any],
    *,
    upper: Tensor | Sequence[float] | None,
    keep: Tensor | None,
    keep_density: PerExpert | None,
    seed: int,
    tensor_id: int,
    task_ids: Sequence[int] | None,
    scales: PerExpert | None,
    unique_scales: PerExpert | None,
    min_count: int,
) -> dict[str, Any]:
    """What is kept besides the trim, its factors, as the op takes them; empty where none are given."""
    num_tasks, semantics, reduce = len(experts), options["semantics"], options["reduce"]
    if scales is not None and semantics not in SCALED:
        raise ValueError(f"scales must be None with semantics={semantics!r}, got {scales}")
    if scales is not None and options["rescale"]:
        raise ValueError("rescale must be False where scales are given, got True")
    if unique_scales is not None and reduce != "unique":
        raise ValueError(f"unique_scales must be None with reduce={reduce!r}, got {unique_scales}")
    if not isinstance(min_count, int) or not 0 <= min_count <= num_tasks:
        raise ValueError(f"min_count must be an integer between 0 and the number of experts, got {min_count!r}")
    narrowed: dict[str, Any] = {}
    if upper is not None:
        narrowed["upper"] = _check_thresholds(upper, num_tasks, "upper")
    if keep is not None:
        narrowed["keep"] = [_check_keep(keep, experts[0], num_tasks)]
    if keep_density is not None:
        narrowed["keep_density"] = _check_keep_density(keep_density, num_tasks)
        narrowed["seed"] = check_seed(seed)
        narrowed["tensor_ids"] = check_ids("tensor_id", [tensor_id], 1)
        narrowed["task_ids"] = None if task_ids is None else check_ids("task_ids", task_ids, num_tasks)
    if scales is not None:
        narrowed["scales"] = _check_factors("scales", scales, num_tasks)
    if unique_scales is not None:
        narrowed["unique_scales"] = _check_factors("unique_scales", unique_scales, num_tasks)
    if min_count > 0:
        narrowed["min_count"] = min_count
    return narrowed


def _check_keep(keep: Tensor, like: Tensor, num_tasks: int) -> Tensor:
    """As packed bits."""
    if not isinstance(keep, Tensor) or keep.dtype not in (torch.bool, torch.uint8):
        got = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
        raise TypeError(f"keep must be a bool tensor, or packed bits in uint8, got {got}")
    shape = like.shape if keep.dtype == torch.bool else (-(-like.numel() // 8),)
    if keep.dim() == 0 or keep.shape[0] not in (1, num_tasks) or keep.shape[1:] != shape:
        wanted = ", ".join(map(str, (f"{num_tasks} or 1", *shape)))
        raise ValueError(f"keep must have shape ({wanted}) in {keep.dtype}, got {tuple(keep.shape)}")
    if keep.device != like.device:
        raise ValueError(f"keep must be on the device of experts[0], {like.device}, got {keep.device}")
    return pack(keep) if keep.dtype == torch.bool else keep


def _check_keep_density(keep_density: PerExpert, num_tasks: int) -> list[float]:
    values = arguments.per_expert("keep_density", keep_density, num_tasks)
    for v in values:
        if not 0 <= v <= 1:
            raise ValueError(f"keep_density must be in [0, 1], got {v}")
    return values


def _check_factors(argument: str, factors: PerExpert, num_tasks: int) -> Tensor:
    """float64 [1, num_tasks]"""
    return torch.tensor([arguments.per_expert(argument, factors, num_tasks)], dtype=torch.float64)


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
    upper: Tensor | Sequence[float] | None = None,
    keep: Tensor | None = None,
    keep_density: PerExpert | None = None,
    seed: int = 0,
    tensor_id: int = 0,
    task_ids: Sequence[int] | None = None,
    scales: PerExpert | None = None,
    unique_scales: PerExpert | None = None,
    min_count: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """``base + lam * mean_t of the trimmed (expert_t - base) that agree with the elected sign``, per parameter.

    Bit-identical on every instruction set, thread count and split of the work. Writes once, and reads the inputs twice:
    once where they are 1 GiB or more, in float32 or float64 (on a GPU 256 MiB or more, of up to 32 experts), or no
    threshold is to be found and `nonfinite` is not "error"; three times with `rescale`. Inputs that are not contiguous
    are copied first.

    Args:
        base: Pretrained tensor of any shape, float64, float32, float16 or bfloat16; None when `experts` already are
            task vectors: then the merged task vector is returned.
        experts: List of num_tasks >= 1 tensors like `base`, or one stacked tensor [num_tasks, \\*shape].
        density: Share of entries each expert keeps, in (0, 1], largest magnitudes first; one number or one per expert.
        lam: Scale of the merged task vector, finite.
        weights: One finite number, or one per expert. "mergekit" and "exact" apply them before the election, "peft"
            after it; "paper", "magmax" and "unique" take none.
        semantics: Whose TIES, bit for bit. "paper": every tie at the threshold is kept; where the election is a draw,
            the sign of the sum of all elected signs of this call decides. "mergekit", "peft": exactly the number kept
            stays, ties in flat index order; draws elect plus. "exact": as "mergekit", but in float32 (float64 for
            float64 inputs) from the difference to the last sum, rounded once; what is kept is decided on task vectors
            as their dtype stores them, as everywhere.
        elect: "sum" elects the sign of the summed entries, "count" the more frequent sign; "none" ("mergekit", "exact")
            lets every entry agree: with density 1 that is mergekit's `task_arithmetic`.
        reduce: "mean", "sum" or (paper only) "max" of the entries that agree; with "exact" and no election also
            "magmax", the entry of the largest magnitude, of equal ones the last expert's, and "unique", the mean of
            several kept entries, while one alone is multiplied by its `unique_scales`.
        normalize: "mergekit", "exact": divide a mean by the sum of the agreeing weights, unless that is 0. Without an
            election "mergekit" takes all weights (unless below 1e-8), "exact" those of the kept entries. Where False,
            "mean" is "sum".
        rescale: "mergekit", "exact": scale each trimmed task vector to the L1 norm it had before. mergekit rounds norms
            and ratio to the dtype; with `keep` or `keep_density`, its random methods, to float32 for float16.
        nonfinite: What NaN or infinity in a task vector does: "error" raises before anything is written,
            "propagate" lets it take part (NaN always reaches the output), "drop" takes the entry as 0.
        thresholds: [num_tasks], 0 or greater, float32 or float64: keep ``abs(expert - base) >= thresholds``, compared
            in float32 (float64 for float64 inputs), instead of reading `density`.
        upper: As `thresholds`: drop ``abs(expert - base) > upper``. What limits drop is never NaN.
        keep: Masks of what else is kept: bool [num_tasks, \\*shape], or packed as by `masks`, uint8 [num_tasks,
            ceil(numel / 8)]; with 1 for num_tasks all experts share it.
        keep_density: Probability in [0, 1] of keeping an entry (DARE), one number or one per expert: the masks that
            `masks` draws by rule "random" under `seed`, `tensor_id` and `task_ids`, drawn while they are applied.
        seed, tensor_id, task_ids: As in `masks`.
        scales: "mergekit", "exact", in place of `rescale`: factors of the kept entries, one number or one per expert.
            mergekit rounds the product before it is weighted.
        unique_scales: "unique" only: one number or one per expert.
        min_count: Elements with fewer kept entries, zeros not counted, are those of the base.
        out: Tensor like `base` that receives the result; may be a memory-mapped file. It must not overlap an input.

    Returns:
        A tensor like `base`, or `out`. Carries no gradient. Empty for empty inputs.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.
        RuntimeError: `out` overlaps an input or itself, a threshold is negative, or NaN or infinity under
            ``nonfinite="error"``; `out` is untouched.

    Source: TIES-Merging (arXiv 2306.01708), algorithm 1; mergekit 0.1.5 `ties`, `task_arithmetic`, `dare_ties`,
        `breadcrumbs`; PEFT `ties`; MagMax (arXiv 2407.06322); RAM (arXiv 2601.13572).
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
    narrowed = _check_narrowing(
        experts,
        options,
        upper=upper,
        keep=keep,
        keep_density=keep_density,
        seed=seed,
        tensor_id=tensor_id,
        task_ids=task_ids,
        scales=scales,
        unique_scales=unique_scales,
        min_count=min_count,
    )
    if out is None and not narrowed:
        return _ops.ties_merge(base, experts, **options)
    bases = [] if base is None else [base]
    if out is None:
        merged = experts[0].new_empty(experts[0].shape)
        _ops.ties_merge_out(bases, experts, **options, **narrowed, out=[merged])
        return merged
    arguments.check_like("out", out, experts[0], "experts[0]")
    if options["nonfinite"] == "error" and options["thresholds"] is None:
        # the op may write before it has read everything
        _ops.trim_thresholds(base, experts, [1.0] * len(experts), nonfinite="error")
    _ops.ties_merge_out(bases, experts, **options, **narrowed, out=[out.detach()])
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
