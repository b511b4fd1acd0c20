"""The picture of ``gracile spectra``: four panels over a model's layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .spectra_rows import Found

# Okabe & Ito's colours, which readers who do not see all of them tell apart.
BLUE, RED, GREY, GREEN = "#0072B2", "#D55E00", "0.45", "#009E73"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def draw(path: Path, found: Sequence[Found], called: Mapping[str, str], epsilon: float) -> None:
    """Intruders beside their control, similarities of leading vectors, effective rank of the update and principal
    angles, by layer, each of which is ``called`` something."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 5.4), layout="constrained")
        axes = figure.subplots(2, 2)
        layers, names = list(called), [name or "none" for name in called.values()]
        of_layer = [[one for one in found if one.place.layer == layer] for layer in layers]
        _intruders(axes[0][0], of_layer)
        _similarity(figure, axes[0][1], of_layer, names, epsilon)
        _ranks(axes[1][0], of_layer, layers, found)
        _angles(axes[1][1], of_layer)
        for panel, letter in zip(axes.flat, "abcd", strict=True):
            panel.set_title(f"$\\bf{{{letter}}}$  {panel.get_title(loc='left')}")
        for panel in (axes[0][0], axes[1][0], axes[1][1]):
            _label_layers(panel, names)
        figure.savefig(path, dpi=200)


def _values(of_layer: Sequence[Sequence[Found]], key: str) -> list[list[float]]:
    return [[getattr(one.measures, key) for one in layer] for layer in of_layer]


def _line(panel: Any, values: Sequence[Sequence[float]], colour: str, label: str, **style: Any) -> None:
    """Means with a band from the smallest to the largest."""
    x = np.arange(len(values))
    panel.plot(x, [np.mean(layer) for layer in values], color=colour, label=label, ms=3.5, lw=1.4, **style)
    if any(len(set(layer)) > 1 for layer in values):
        low, high = ([edge(layer) for layer in values] for edge in (min, max))
        panel.fill_between(x, low, high, color=colour, alpha=0.13, lw=0)


def _intruders(panel: Any, of_layer: Sequence[Sequence[Found]]) -> None:
    k = max(len(one.measures.similarity) for layer in of_layer for one in layer)
    _line(panel, _values(of_layer, "control"), GREY, "same update, random directions", marker="s", ls="--")
    _line(panel, _values(of_layer, "intruders"), RED, "fine-tuned", marker="o")
    panel.set(title="Intruder dimensions", ylabel=f"of {k} leading vectors")
    top = max(1, *(max(layer) for key in ("control", "intruders") for layer in _values(of_layer, key)))
    panel.set_ylim(0, 1.35 * top)  # room for the legend
    panel.set_yticks(range(0, int(top) + 1, max(1, int(top) // 5)))
    panel.legend(loc="upper left")


def _similarity(
    figure: Any, panel: Any, of_layer: Sequence[Sequence[Found]], names: Sequence[str], epsilon: float
) -> None:
    k = max(len(one.measures.similarity) for layer in of_layer for one in layer)
    image = np.full((len(names), k), np.nan)
    for row, layer in enumerate(of_layer):
        for j in range(k):
            seen = [one.measures.similarity[j] for one in layer if j < len(one.measures.similarity)]
            image[row, j] = np.mean(seen) if seen else np.nan
    shown = panel.imshow(image, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower", interpolation="nearest")
    bar = figure.colorbar(shown, ax=panel, pad=0.02)
    bar.ax.axhline(epsilon, color="white", lw=1.5)
    bar.set_label(r"$\max_i\,|\langle u_j^{\,1}, u_i^{\,0}\rangle|$")
    panel.set(title="Similarity to the base", xlabel="singular vector $j$", ylabel="layer")
    steps = range(0, k, max(1, k // 10))
    panel.set_xticks(steps, [str(j + 1) for j in steps])
    _label_layers(panel, names, vertical=True)
    panel.spines[:].set_visible(False)


def _ranks(panel: Any, of_layer: Sequence[Sequence[Found]], layers: Sequence[str], found: Sequence[Found]) -> None:
    for number, kind in enumerate(dict.fromkeys(one.place.kind for one in found)):
        points = {layers.index(one.place.layer): one.measures.effective_rank for one in found if one.place.kind == kind}
        label = "one kind of matrix" if number == 0 else None
        panel.plot(list(points), list(points.values()), color=BLUE, alpha=0.3, lw=0.8, label=label)
    means = [np.mean(layer) for layer in _values(of_layer, "effective_rank")]
    panel.plot(range(len(means)), means, color=BLUE, marker="o", ms=3.5, lw=1.4, label="mean")
    panel.set(title="Effective rank of the update", ylabel=r"$\exp\,H(\sigma^2 / \Sigma\sigma^2)$")
    top = max(max(layer) for layer in _values(of_layer, "effective_rank"))
    panel.set_ylim(0, 1.3 * top if top else 1)
    panel.legend(loc="upper left", ncols=2)


def _angles(panel: Any, of_layer: Sequence[Sequence[Found]]) -> None:
    for side, colour, marker in (("left", GREEN, "o"), ("right", BLUE, "^")):
        largest = [max(layer) for layer in _values(of_layer, f"{side}_angle_max")]
        panel.plot(
            range(len(largest)), largest, color=colour, marker=marker, ms=3.5, lw=1, ls=":", label=f"{side}, max"
        )
        _line(panel, _values(of_layer, f"{side}_angle_mean"), colour, f"{side}, mean", marker=marker)
    sizes = sorted({one.measures.subspace for layer in of_layer for one in layer})
    dimension = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    panel.set(title=f"Principal angles, {dimension} dimensions", ylabel="degrees")
    top = max(max(layer) for side in ("left", "right") for layer in _values(of_layer, f"{side}_angle_max"))
    panel.set_ylim(0, 1.4 * top if top else 1)
    if top > 45:
        panel.set_yticks(range(0, 91, 15))
    panel.legend(loc="upper left", ncols=2)


def _label_layers(panel: Any, names: Sequence[str], vertical: bool = False) -> None:
    """At most a dozen layers."""
    at = range(0, len(names), max(1, -(-len(names) // 12)))
    if vertical:
        panel.set_yticks(at, [names[i] for i in at])
        return
    turned = {"rotation": 30, "ha": "right"} if any(len(name) > 3 for name in names) else {}
    panel.set_xticks(at, [names[i] for i in at], **turned)
    panel.set(xlabel="layer", xlim=(-0.4, len(names) - 0.6))
