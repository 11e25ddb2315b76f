"""Draw docs/images/goctconv.png: the paths of a gOctConv, and the weight they share.

Run by ``make pictures``. Needs matplotlib and nothing of sodfast.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

SAME, DOWN, UP = "#4c5a67", "#c8553d", "#2a7f9e"
INK = "#22282e"
CHANNELS_IN = (5, 4, 3)
CHANNELS_OUT = (4, 5, 3)
SIZES = ("H × W", "H/2 × W/2", "H/4 × W/4")


def colour(source: int, target: int) -> str:
    """The colour of the path from one scale to another."""
    return SAME if source == target else DOWN if target > source else UP


def stack(axes: Axes, x: float, y: float, side: float, channels: int) -> None:
    """A feature map: one square per channel, the last one in front."""
    for i in range(channels):
        shift = 0.09 * (channels - 1 - i)
        axes.add_patch(
            Rectangle(
                (x - side / 2 + shift, y - side / 2 + shift),
                side,
                side,
                facecolor="#f4efe4",
                edgecolor=INK,
                linewidth=0.9,
            )
        )


def draw_paths(axes: Axes) -> None:
    """Left half: three scales in, three scales out, and the nine paths between them."""
    rows = (4.9, 2.45, 0.75)
    sides = (1.7, 0.95, 0.5)
    left, right = 1.2, 7.1
    for y, side, size, channels_in, channels_out in zip(
        rows, sides, SIZES, CHANNELS_IN, CHANNELS_OUT, strict=True
    ):
        stack(axes, left, y, side, channels_in)
        stack(axes, right, y, side, channels_out)
        axes.text(left - 1.15, y, size, ha="right", va="center", fontsize=10, color=INK)
    for source in range(3):
        for target in range(3):
            start = left + sides[source] / 2 + 0.12 * CHANNELS_IN[source]
            axes.add_patch(
                FancyArrowPatch(
                    (start, rows[source] + 0.12 * (1 - target)),
                    (right - sides[target] / 2 - 0.08, rows[target] + 0.12 * (1 - source)),
                    arrowstyle="-|>",
                    mutation_scale=11,
                    linewidth=1.6,
                    color=colour(source, target),
                    shrinkA=0,
                    shrinkB=0,
                )
            )
    axes.text(left, 6.3, "inputs", ha="center", fontsize=11, color=INK)
    axes.text(right, 6.3, "outputs: summed over the inputs", ha="center", fontsize=11, color=INK)
    legend = (
        (SAME, "same scale: convolve"),
        (DOWN, "to a coarser one: max-pool, then convolve"),
        (UP, "to a finer one: convolve, then upsample (bilinear)"),
    )
    for i, (shade, text) in enumerate(legend):
        y = -0.35 - 0.42 * i
        axes.plot([0.4, 1.0], [y, y], color=shade, linewidth=2.6)
        axes.text(1.2, y, text, va="center", fontsize=10, color=INK)
    axes.set_xlim(-1.6, 9.2)
    axes.set_ylim(-1.6, 6.7)


def draw_weight(axes: Axes) -> None:
    """Right half: the one weight tensor, cut into a block for each path."""
    total_out = sum(CHANNELS_OUT)
    top = total_out
    for target, rows in enumerate(CHANNELS_OUT):
        x = 0
        for source, columns in enumerate(CHANNELS_IN):
            axes.add_patch(
                Rectangle(
                    (x, top - rows),
                    columns,
                    rows,
                    facecolor=colour(source, target),
                    edgecolor="white",
                    linewidth=2.5,
                )
            )
            axes.text(
                x + columns / 2,
                top - rows / 2,
                f"{source}→{target}",
                ha="center",
                va="center",
                color="white",
                fontsize=10,
            )
            x += columns
        axes.text(-0.3, top - rows / 2, f"out {target}", ha="right", va="center", fontsize=9)
        top -= rows
    x = 0
    for source, columns in enumerate(CHANNELS_IN):
        axes.text(x + columns / 2, total_out + 0.25, f"in {source}", ha="center", fontsize=9)
        x += columns
    axes.text(
        sum(CHANNELS_IN) / 2,
        total_out + 1.5,
        "one weight, [ΣC_out, ΣC_in, k, k]",
        ha="center",
        fontsize=11,
        color=INK,
    )
    axes.text(
        sum(CHANNELS_IN) / 2,
        -1.0,
        "a slice for each path, finest scale first;\n"
        "any scale may have any number of channels, or none",
        ha="center",
        va="top",
        fontsize=10,
        color=INK,
    )
    axes.set_xlim(-2.6, 13)
    axes.set_ylim(-3.4, 14.6)


def main() -> None:
    figure, (paths, weight) = plt.subplots(
        1, 2, figsize=(11, 5.0), gridspec_kw={"width_ratios": [1.55, 1]}, facecolor="white"
    )
    for axes in (paths, weight):
        axes.set_aspect("equal")
        axes.axis("off")
    draw_paths(paths)
    draw_weight(weight)
    figure.tight_layout(pad=0.4)
    target = Path(__file__).parent / "images" / "goctconv.png"
    target.parent.mkdir(exist_ok=True)
    # no metadata: the same drawing gives the same file
    figure.savefig(target, dpi=160, metadata={"Software": None})
    print(target)


if __name__ == "__main__":
    main()
