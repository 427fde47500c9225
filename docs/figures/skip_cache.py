"""Draws docs/images/skip_cache.png: the U of long skips, a full and a reused step, and when each is taken.

python docs/figures/skip_cache.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

from skipdit import SkipCacheConfig, make_scheduler  # noqa: E402

OUTPUT = Path(__file__).resolve().parents[1] / "images" / "skip_cache.png"
INK, PALE, LINE = "#1f2933", "#9aa5b1", "#52606d"
RUNS, IDLE, KEPT = "#2b6cb0", "#eef1f4", "#dd6b20"
ROWS = 4  # units of each half; the drawing has 8, Latte-XL/2 has 14
REUSED_SHARE = 4 / 28  # of the blocks of Latte-XL/2
LEFT, RIGHT, WIDTH, HEIGHT = 0.0, 2.9, 1.5, 0.56


def unit(axes: Axes, x: float, y: float, name: str, runs: bool) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0,rounding_size=0.12",
            facecolor=RUNS if runs else IDLE,
            edgecolor=RUNS if runs else "#cbd2d9",
            linewidth=1.2,
        )
    )
    axes.text(x + WIDTH / 2, y, name, ha="center", va="center", fontsize=10.5, color="white" if runs else PALE)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, **style) -> None:
    properties = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0, **style}
    axes.annotate("", xy=end, xytext=start, arrowprops=properties)


def draw_u(axes: Axes, reused: bool) -> None:
    """The network as a U: down the left half, up the right half, long skips across."""
    axes.set(xlim=(-0.5, 4.9), ylim=(-0.1, 4.95))
    axes.axis("off")
    heights = [3.75, *(2.4 - 0.9 * row for row in range(ROWS - 1))]
    left, right = LEFT + WIDTH / 2, RIGHT + WIDTH / 2
    for row, y in enumerate(heights):
        runs = not reused or row == 0
        across = INK if runs else "#d5dbe1"
        unit(axes, LEFT, y, f"unit {row}", runs)
        unit(axes, RIGHT, y, f"unit {2 * ROWS - 1 - row}", runs)
        arrow(axes, (LEFT + WIDTH, y), (RIGHT, y), across, linestyle=(0, (4, 2.5)))
        if row + 1 < ROWS:
            inner = LINE if not reused else "#d5dbe1"
            below = heights[row + 1]
            arrow(axes, (left, y - HEIGHT / 2), (left, below + HEIGHT / 2), inner)
            if row or not reused:
                arrow(axes, (right, below + HEIGHT / 2), (right, y - HEIGHT / 2), inner)
    bottom = heights[-1] - HEIGHT / 2
    turn = LINE if not reused else "#d5dbe1"
    axes.plot([left, left, right], [bottom, bottom - 0.3, bottom - 0.3], color=turn, linewidth=1.5)
    arrow(axes, (right, bottom - 0.3), (right, bottom), turn)
    arrow(axes, (left, 4.5), (left, heights[0] + HEIGHT / 2), LINE)
    arrow(axes, (right, heights[0] + HEIGHT / 2), (right, 4.5), LINE)
    axes.text(left, 4.58, "noisy latents", ha="center", va="bottom", fontsize=10, color=INK)
    axes.text(right, 4.58, "predicted noise", ha="center", va="bottom", fontsize=10, color=INK)
    draw_memory(axes, heights[0] - 0.68, right, reused)
    if not reused:
        axes.text(2.2, heights[0] + 0.1, "long skip", ha="center", va="bottom", fontsize=9, color=INK)


def draw_memory(axes: Axes, y: float, x: float, reused: bool) -> None:
    """The tensor that enters the last unit: put aside on a full step, taken from there on a reused one."""
    axes.plot(x, y, "o", color=KEPT, markersize=9, zorder=5)
    if reused:
        arrow(axes, (x, y), (x, y + 0.4), KEPT, linewidth=2.2)
        text = "the tensor kept at\nthe last full step"
    else:
        text = "kept for the\nsteps to come"
    axes.text(x + 0.2, y, text, ha="left", va="center", fontsize=9.5, color=KEPT, weight="bold")


def draw_schedule(axes: Axes) -> None:
    """Which of 50 steps are full, asked of the same code that samples."""
    config = SkipCacheConfig.parse("N2-900-50")
    scheduler = make_scheduler("ddim")
    scheduler.set_timesteps(50)
    timesteps = scheduler.timesteps.tolist()
    full = config.schedule(timesteps)
    for index, is_full in enumerate(full):
        axes.bar(index, 1.0 if is_full else REUSED_SHARE, width=0.72, color=RUNS if is_full else KEPT)
    reused = len(full) - sum(full)
    axes.set(xlim=(-0.8, len(full) - 0.2), ylim=(0, 1.12), yticks=[])
    ticks = list(range(0, 50, 7))
    axes.set_xticks(ticks, [str(timesteps[tick]) for tick in ticks], fontsize=9, color=INK)
    axes.set_xlabel("timestep of the 50 sampler steps, from noise to sample", fontsize=9.5, color=INK)
    axes.set_title(
        f"N2-900-50: {sum(full)} full, {reused} reused steps; height: share of Latte-XL/2's blocks that run",
        fontsize=10.5,
        color=INK,
        loc="left",
    )
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#cbd2d9")
    axes.tick_params(color="#cbd2d9")


def main() -> None:
    figure = plt.figure(figsize=(9.4, 6.6), facecolor="white")
    grid = figure.add_gridspec(2, 2, height_ratios=(3.5, 1), hspace=0.16, wspace=0.05)
    titles = ("Full step: every unit runs", "Reused step: the outermost units run")
    for column, title in enumerate(titles):
        axes = figure.add_subplot(grid[0, column])
        draw_u(axes, reused=bool(column))
        axes.set_title(title, fontsize=13, color=INK, weight="bold", pad=6)
    draw_schedule(figure.add_subplot(grid[1, :]))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUTPUT, dpi=110, bbox_inches="tight", metadata={"Software": None})
    print(OUTPUT)


if __name__ == "__main__":
    main()
