"""LegoMerge: what encoders of several modalities give, and their heads, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import arguments, gram, mix
from ..ops.arguments import PerExpert
from .state_dicts import StateDict, merge_state_dicts, owners_of

RULES = ("paper", "published")
SMALLEST_NORM = 1e-8  # below it a head's tensor has no direction


def merge_latents(
    latents: Sequence[Tensor], *, weights: PerExpert | None = None, rule: str = "paper", dim: int = -1
) -> Tensor:
    """Frequency by frequency the weighted harmonic mean of the magnitudes, and the mean of the phases.

    ``1 / sum_t w_t / |z_t|`` times the direction of ``sum_t w_t z_t / |z_t|``: a frequency that one latent lacks is
    not in the result, and phases are averaged as angles are, so that those about pi do not cancel. Where phases cancel
    exactly the first latent's is taken.

    Args:
        latents: Two tensors or more of one shape, dtype and device. Complex: frequencies. Real (float64 to bfloat16):
            their transform along `dim` is merged, and the result transformed back.
        weights: 0 or greater, not all 0; one number or one per latent, divided by their sum. None: all alike.
        rule: "paper"; or "published", what the authors' code computes of two latents: with a the first's share and
            magnitudes m, ``2 a (1 - a) m_1 m_2 / (a m_2 + (1 - a) m_1)``, half of what the paper says for equal weights
            and less for others, and the plain mean of the phases in (-pi, pi], which turns around at pi.
        dim: Along which real latents are transformed.

    Returns:
        A tensor like the latents, computed in float32 or wider. 0 where a latent that has a weight is 0.

    Raises:
        ValueError, TypeError: an argument is outside its range, or shapes, dtypes or devices differ.

    Source: MM-Lego (arXiv 2405.19950), LegoMerge. Its code averages with a = 0.8.
    """
    arguments.check_one_of("rule", rule, RULES)
    latents = list(latents)
    if len(latents) < 2 or (rule == "published" and len(latents) > 2):
        wanted = "two tensors" if rule == "published" else "two tensors or more"
        raise ValueError(f"latents must be {wanted}, got {len(latents)}")
    for t, latent in enumerate(latents):
        arguments.check_like(f"latents[{t}]", latent, latents[0], "latents[0]")
    shares = arguments.per_expert("weights", 1.0 if weights is None else weights, len(latents))
    if min(shares) < 0 or sum(shares) == 0:
        raise ValueError(f"weights must be 0 or greater and not all 0, got {weights}")
    shares = [share / sum(shares) for share in shares]
    first = latents[0]
    if first.is_complex():
        return _of_frequencies(latents, shares, rule)
    if not first.is_floating_point() or not first.dim():
        raise ValueError(
            f"latents must be floating-point of one dimension or more, or complex, got {first.dtype} "
            f"{tuple(first.shape)}"
        )
    compute = torch.promote_types(first.dtype, torch.float32)
    frequencies = [torch.fft.fft(latent.to(compute), dim=dim) for latent in latents]
    return torch.fft.ifft(_of_frequencies(frequencies, shares, rule), dim=dim).real.to(first.dtype)


def _of_frequencies(latents: Sequence[Tensor], shares: Sequence[float], rule: str) -> Tensor:
    magnitudes = [z.abs() for z in latents]
    counted = [t for t, share in enumerate(shares) if share > 0]
    if rule == "published":
        (m, n), (a, b) = magnitudes, shares
        below = a * n + b * m
        magnitude = 2 * a * b * m * n / below.where(below > 0, 1.0)
        return torch.polar(magnitude, (latents[0].angle() + latents[1].angle()) / 2)
    # 1 / sum_t w_t / m_t, times a product that leaves nothing to divide by 0
    present = torch.stack([magnitudes[t] > 0 for t in counted]).all(0)
    units = [latents[t] / magnitudes[t].where(magnitudes[t] > 0, 1.0) for t in counted]
    inverse = sum(shares[t] / magnitudes[t].where(present, 1.0) for t in counted)
    direction = torch.stack([shares[t] * unit for t, unit in zip(counted, units, strict=True)]).sum(0)
    length = direction.abs()
    cancels = length <= 4 * torch.finfo(length.dtype).eps
    direction = torch.where(cancels, units[0], direction / length.where(~cancels, 1.0))
    return torch.where(present, direction / inverse, 0.0)


def merge_heads(first: StateDict, second: StateDict, *, t: float = 0.5, rule: str = "paper") -> dict[str, Tensor]:
    """Along the arc from the first head's tensors (t = 0) to the second's (t = 1).

    Args:
        first, second: State dicts with the same names, shapes, dtypes and devices.
        t: The place between them; finite.
        rule: "paper": spherical interpolation, as ``merge_state_dicts(method="slerp")`` has it. "published", what the
            authors' code computes: ``a cos(t theta) + u sin(t theta)``, theta the angle of a and b, u the direction of
            ``b - a cos(theta)``. It ends at b only if both have norm 1. Where that is not a number (zeros, or b = a) it
            is the linear interpolation.

    Returns:
        A state dict like the first.

    Raises:
        ValueError, TypeError: `t` is not finite, or the state dicts differ.
        RuntimeError: NaN or infinity.

    Source: MM-Lego (arXiv 2405.19950).
    """
    arguments.check_one_of("rule", rule, RULES)
    if rule == "paper":
        return merge_state_dicts(first, [second], method="slerp", t=t)
    t = arguments.number("t", t)
    if not -float("inf") < t < float("inf"):
        raise ValueError(f"t must be finite, got {t}")
    owner = owners_of(first, [second], "first")
    merged: dict[str, Tensor] = {}
    for name, a in first.items():
        if owner[name] != name:
            merged[name] = merged[owner[name]]
        elif a.is_floating_point():
            pair = [a, second[name]]
            (merged[name],) = mix(None, pair, _published(gram(None, pair), t)[None], task_vectors=False)
        else:
            merged[name] = a.detach().clone()
    return merged


def _published(products: Tensor, t: float) -> Tensor:
    """Coefficients of both vectors, from their dot products [2, 2]."""
    squares = products.diagonal().clamp(min=0)
    norms = squares.sqrt()
    linear = torch.tensor([1 - t, t], dtype=torch.float64, device=products.device)
    if norms.min() <= SMALLEST_NORM:
        return linear
    cosine = (products[0, 1] / (norms[0] * norms[1])).clamp(-1, 1)
    beside = (squares[1] - 2 * cosine * products[0, 1] + cosine.square() * squares[0]).clamp(min=0).sqrt()
    if beside <= SMALLEST_NORM * norms.max():
        return linear
    angle = t * cosine.acos()
    return torch.stack([angle.cos() - cosine * angle.sin() / beside, angle.sin() / beside])
