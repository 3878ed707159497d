"""Representation bias as pictures; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, apart for colour-blind readers too; markers differ as well.
COLORS = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


def plot_bias(biases: Mapping[str, Mapping[str, float]]) -> Figure:
    """A line per method over the depth of the model: method -> site -> bias, as from `representation_bias`.

    The method with the most sites gives the axis; another may have some of them only.
    """
    from matplotlib.figure import Figure

    if not biases:
        raise ValueError("biases must be of at least one method, got none")
    longest = max(biases, key=lambda method: len(biases[method]))
    sites = list(biases[longest])
    for method, bias in biases.items():
        for site in bias:
            if site not in sites:
                raise ValueError(f"biases must have sites of {longest!r} only, got {site!r} in {method!r}")
    figure = Figure(figsize=(7, 3.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for (method, bias), color, marker in zip(biases.items(), cycle(COLORS), cycle(MARKERS), strict=False):
        depths = [sites.index(site) for site in bias]
        axes.plot(depths, list(bias.values()), f"{marker}-", color=color, markersize=5, label=method)
    axes.set_xticks(range(len(sites)), [*map(str, range(1, len(sites))), "final"])
    axes.set(xlabel="block", ylabel="mean |features - expert's|")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Representation bias by depth", loc="left", weight="bold")
    axes.legend(frameon=False)
    return figure


def plot_features(features: Mapping[str, Tensor]) -> Figure:
    """A cloud per model, such as merged, surgery and expert: name -> features [samples, dim] of one site.

    All are projected onto the two principal components of all together.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    clouds = project(list(features.values()))
    for name, cloud, color, marker in zip(features, clouds, cycle(COLORS), cycle(MARKERS), strict=False):
        axes.scatter(
            cloud[:, 0].numpy(),
            cloud[:, 1].numpy(),
            s=10,
            color=color,
            marker=marker,
            alpha=0.5,
            linewidths=0,
            label=name,
        )
    axes.set(xlabel="first principal component", ylabel="second", xticks=[], yticks=[])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Features, projected to two dimensions", loc="left", weight="bold")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, markerscale=2, handletextpad=0)
    return figure


def project(clouds: Sequence[Tensor]) -> list[Tensor]:
    """Each cloud [samples, dim] on the two directions in which all of them together vary most.  # [samples, 2]"""
    if not clouds:
        raise ValueError("features must be of at least one model, got none")
    if len({cloud.shape[1:] for cloud in clouds}) > 1 or clouds[0].dim() != 2 or clouds[0].shape[1] < 2:
        shapes = [tuple(cloud.shape) for cloud in clouds]
        raise ValueError(f"features must have shape [samples, dim] with one dim of 2 or greater, got {shapes}")
    together = torch.cat([cloud.double() for cloud in clouds])
    center = together.mean(dim=0)
    _, directions = torch.linalg.eigh((together - center).T @ (together - center))  # [dim, dim], ascending
    return [(cloud.double() - center) @ directions[:, -2:].flip(1) for cloud in clouds]
