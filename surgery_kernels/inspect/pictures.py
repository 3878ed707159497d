"""The pictures of an inspection as PNG files."""

from __future__ import annotations

from pathlib import Path

from .inspection import Inspection


def write_pictures(of: Inspection, folder: Path) -> list[Path]:
    """cosines.png, change.png and conflict.png, as far as there are pairs and layers; needs matplotlib.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ImportError("matplotlib must be installed for pictures: pip install matplotlib") from None
    folder.mkdir(parents=True, exist_ok=True)
    labels = of.labels
    layers = list(of.by_layer)
    written = []

    def saved(figure: Figure, name: str) -> None:
        figure.savefig(folder / name)
        written.append(folder / name)

    if len(labels) > 1:
        figure = Figure(figsize=(1.5 + 0.6 * len(labels), 1.2 + 0.6 * len(labels)), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(of.whole.cosines, vmin=-1, vmax=1, cmap="RdBu")
        axes.set_xticks(range(len(labels)), [str(t + 1) for t in range(len(labels))])
        axes.set_yticks(range(len(labels)), labels)
        axes.set_title("cosine of task vectors")
        figure.colorbar(image)
        saved(figure, "cosines.png")
    if len(layers) > 1:
        figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        for t, label in enumerate(labels):
            axes.plot(layers, [100 * numbers.relative[t] for numbers in of.by_layer.values()], ".-", label=label)
        axes.set(xlabel="layer", ylabel="change, % of the base's length", ylim=(0, None))
        axes.legend(frameon=False)
        saved(figure, "change.png")
        if len(labels) > 1:
            figure = Figure(figsize=(7, 3.6), dpi=150, layout="constrained")
            axes = figure.add_subplot()
            axes.bar(layers, [100 * numbers.lost for numbers in of.by_layer.values()])
            axes.set(xlabel="layer", ylabel="change against the rest of it (%)", ylim=(0, None))
            saved(figure, "conflict.png")
    return written
