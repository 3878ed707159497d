"""Merging LoRAs from their factors: no matrix as large as a weight is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..ops import arguments
from .low_rank import LowRank
from .methods.spectral.aligned import Aligned, CoreSpace, Knots
from .state_dicts import SCOPES, method_of

SPACES: dict[str, type[Aligned]] = {method.name: method for method in (Knots, CoreSpace)}


def merge_loras(
    experts: Sequence[Mapping[str, LowRank]],
    *,
    method: str = "knots",
    scope: str = "model",
    rank: int | None = None,
    **options: Any,
) -> dict[str, LowRank]:
    """One LoRA from several, merged in the space that they share.

    Args:
        experts: At least one: what each adds to every weight, by name, scaled. They may have any ranks; one that leaves
            a weight alone has no entry for it.
        method: "knots" or "core_space", which merge by another method, `inner`.
        scope: "model": what that method decides it decides over all weights together; "tensor": over each.
        rank: The most that a result has, the nearest of that rank; None: the sum of the experts' ranks at most.
        **options: The parameters of the method; see its class.

    Returns:
        A product by the name of every weight that an expert changes, in the dtype of the factors, float32 at least.
        ``merged[name].product`` is what is added to the base.

    Raises:
        ValueError, TypeError: shapes or dtypes differ, or an option is unknown or out of range.
        RuntimeError: NaN or infinity under ``nonfinite="error"``, and under "propagate", which factors have no way for.
    """
    arguments.check_one_of("method", method, tuple(SPACES))
    arguments.check_one_of("scope", scope, SCOPES)
    if not experts:
        raise ValueError("experts must be at least one LoRA, got none")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    merging = method_of(method, options)
    assert isinstance(merging, Aligned)
    merging.check(len(experts))
    names = list(dict.fromkeys(name for expert in experts for name in expert))
    spaces = {name: merging.space_of(_finite(merging, name, _of_all(name, experts))) for name in names}
    if scope == "model":
        merged = merging.merged_in(spaces) if spaces else []
    else:
        merged = [merging.merged_in({name: space})[0] for name, space in spaces.items()]
    backs = {name: space.back(block) for (name, space), block in zip(spaces.items(), merged, strict=True)}
    return {name: product if rank is None else product.truncated(rank) for name, product in backs.items()}


def _of_all(name: str, experts: Sequence[Mapping[str, LowRank]]) -> list[LowRank]:
    """One for every expert: of rank 0 where it leaves the weight alone."""
    first = next(expert[name] for expert in experts if name in expert)
    nothing = LowRank(first.up[:, :0], first.down[:0], first.transposed)
    found = [expert.get(name, nothing) for expert in experts]
    for t, one in enumerate(found):
        got = (one.shape, one.transposed, one.up.dtype, one.down.dtype)
        if got != (first.shape, first.transposed, first.up.dtype, first.up.dtype):
            raise ValueError(
                f"experts[{t}][{name!r}] must be like the others, {first.shape} of {first.up.dtype}, got {one.shape} "
                f"of {one.up.dtype} and {one.down.dtype}"
            )
    return found


def _finite(merging: Aligned, name: str, experts: list[LowRank]) -> list[LowRank]:
    if merging.nonfinite == "drop":
        return [expert.finite_only() for expert in experts]
    for t, expert in enumerate(experts):
        if not expert.is_finite:
            raise RuntimeError(f"experts[{t}] must be finite, got NaN or infinity in the factors of {name!r}")
    return experts
