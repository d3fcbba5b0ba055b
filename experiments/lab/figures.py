"""Figures of the experiments, drawn without a display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from experiments.lab.folder import writing
from gendiff import distributed
from gendiff.data import files
from gendiff.metrics.calibration import Calibration

GOOD, BAD, LINE = "#3b6ea5", "#d1342f", "#444444"


def _save(figure: Any, path: Path) -> None:
    """Replace the PNG at once, so that a failure keeps the old one; only the first process writes."""

    def store() -> None:
        with writing(path):
            files.store(path, lambda file: figure.savefig(file, dpi=120, format="png", bbox_inches="tight"))

    try:
        distributed.first(store)
    finally:
        plt.close(figure)


def _grid(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with at most four panels in a line, whose unused panels are empty, and the panels."""
    columns = min(4, max(1, count))
    lines = -(-max(1, count) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, list(axes.flat)


def samples(path: Path, panels: Mapping[str, tuple[np.ndarray, np.ndarray]], limit: float, cells: int) -> None:
    """Draw points (n, 2) of each model, and mark the points that the oracle rejects (2307.16463, Fig. 2).

    Args:
      panels: title -> (points, good).
      limit: half-width of the board.
      cells: along a side; the filled ones are shaded.
    """
    figure, axes = _grid(len(panels), 3.2, 3.4)
    side = 2 * limit / cells
    for axis, (title, (points, good)) in zip(axes, panels.items(), strict=False):
        for i in range(cells):
            for j in range(i % 2, cells, 2):
                axis.add_patch(plt.Rectangle((i * side - limit, j * side - limit), side, side, color="#e9edf2", lw=0))
        axis.scatter(*points[good].T, s=1, color=GOOD, lw=0)
        axis.scatter(*points[~good].T, s=5, color=BAD, lw=0)
        axis.set(xlim=(-1.25 * limit, 1.25 * limit), ylim=(-1.25 * limit, 1.25 * limit), xticks=[], yticks=[])
        axis.set_aspect("equal")
        axis.set_title(f"{title}\n{(~good).sum()} of {len(good)} off", fontsize=9)
    _save(figure, path)


def by_round(
    path: Path, curves: Mapping[str, Sequence[tuple[float, float, float]]], stars: Mapping[str, Mapping[int, float]],
    lines: Mapping[str, float], logarithmic: Sequence[str] = (),
) -> None:  # fmt: skip
    """Draw each quantity against the round, with intervals (2307.16463, Fig. 3).

    Args:
      curves: quantity -> (value, low, high) after rounds 0, 1 ..
      stars: quantity -> {round: value of the model distilled after it}.
      lines: quantity -> a horizontal line.
      logarithmic: the quantities with a logarithmic axis.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False, layout="constrained")
    for axis, (quantity, points) in zip(axes.flat, curves.items(), strict=True):
        value, low, high = np.array(points, float).T
        low, high = np.where(np.isfinite(low), low, value), np.where(np.isfinite(high), high, value)
        rounds = np.arange(len(value))
        axis.errorbar(rounds, value, (np.maximum(value - low, 0), np.maximum(high - value, 0)), marker="o", color=GOOD,
                      capsize=3, label="stacked")  # fmt: skip
        if stars.get(quantity):
            axis.plot(*zip(*stars[quantity].items(), strict=True), "*", ms=12, color=BAD, label="distilled")
        if quantity in lines:
            axis.axhline(lines[quantity], color=LINE, ls=":", label="best possible")
        if quantity in logarithmic and (value > 0).any():
            axis.set_yscale("log")
        axis.set(xlabel="round", ylabel=quantity, xticks=rounds)
        axis.legend(fontsize=8)
    _save(figure, path)


def calibration(path: Path, reports: Mapping[str, tuple[Calibration, float]]) -> None:
    """Draw each classifier's mean C against the noise level beside alpha, and its reliability.

    Args:
      reports: title -> (calibration, share alpha of good samples that the classifier was trained for).
    """
    figure, axes = plt.subplots(2, len(reports), figsize=(3.4 * len(reports), 6.4), squeeze=False)
    for (above, below), (title, (report, alpha)) in zip(axes.T, reports.items(), strict=True):
        times = np.asarray(report.times)
        above.semilogx(times, report.mean, "o-", ms=3, color=GOOD, label="mean C")
        above.axhline(alpha, color=LINE, ls=":", label=f"alpha = {alpha:.4f}")
        above.set(xlabel="noise level", title=title)
        above.legend(fontsize=8)
        below.plot([0, 1], [0, 1], color=LINE, ls=":")
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(times)))
        for predicted, observed, time, colour in zip(report.predicted, report.observed, times, colours, strict=True):
            below.plot(predicted, observed, "o-", ms=3, lw=1, color=colour, label=f"{time:.2g}")
        below.set(xlabel="predicted C", ylabel="observed share of good", xlim=(0, 1), ylim=(0, 1))
        below.legend(fontsize=6, title="noise level", title_fontsize=6)
    figure.tight_layout()
    _save(figure, path)


def image_sheets(path: Path, sheets: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw sheets of images (n, h, w, 1) in [-1, 1], with red frames around malign images.

    Args:
      sheets: title -> (images, benign).
    """
    figure, axes = _grid(len(sheets), 3.6, 2.5)
    for axis, (title, (images, benign)) in zip(axes, sheets.items(), strict=False):
        axis.axis("off")
        axis.imshow(_sheet(images[:60], benign[:60], 10, 6), interpolation="nearest")
        axis.set_title(f"{title}: {(~benign).sum()} of {len(benign)} malign", fontsize=8)
    _save(figure, path)


def error_sheet(path: Path, images: np.ndarray, wrong: np.ndarray) -> None:
    """Draw images (n, h, w, 1) in [-1, 1], with red frames around wrong ones; without images draw nothing."""
    if len(images):
        shown = np.kron(_sheet(images, ~wrong, 15, -(-len(images) // 15)), np.ones((3, 3, 1)))
        with writing(path):
            distributed.first(lambda: files.store(path, lambda file: plt.imsave(file, shown, format="png")))


def _sheet(images: np.ndarray, benign: np.ndarray, across: int, down: int) -> np.ndarray:
    side = images.shape[1] + 2
    sheet = np.ones((down * side, across * side, 3))
    for i, (image, good) in enumerate(zip(images, benign, strict=True)):
        tile = np.ones((side, side, 3)) if good else np.tile([0.82, 0.2, 0.18], (side, side, 1))
        tile[1:-1, 1:-1] = np.clip((image + 1) / 2, 0, 1)
        row, column = divmod(i, across)
        sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = tile
    return sheet


def trade_off(path: Path, curve: Mapping[float, tuple[Any, Any]], others: Mapping[str, tuple[Any, Any]]) -> None:
    """Draw the malign rate against recall along omega, and for other methods.

    Args:
      curve: omega -> (recall, malign rate), as estimates.
      others: title -> the same.
    """
    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    axis.plot(*zip(*[(r.value, m.value) for r, m in curve.values()], strict=True), "-", color=GOOD, lw=1)
    for scale, (r, m) in curve.items():
        _cross(axis, r, m, GOOD, "o")
        axis.annotate(f"{scale:g}", (r.value, m.value), textcoords="offset points", xytext=(5, 4), fontsize=8)
    for marker, (name, (r, m)) in zip("s^Dv", others.items(), strict=False):
        _cross(axis, r, m, BAD, marker, name)
    axis.set(xlabel="recall", ylabel="malign rate", title="the numbers are omega")
    axis.set_yscale("symlog", linthresh=0.005)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    _save(figure, path)


def _cross(axis: Any, x: Any, y: Any, color: str, marker: str, label: str | None = None) -> None:
    errors = [[[max(e.value - e.low, 0)], [max(e.high - e.value, 0)]] for e in (x, y)]
    axis.errorbar(x.value, y.value, xerr=errors[0], yerr=errors[1], marker=marker, color=color, lw=0.8, label=label)


def by_labels(path: Path, curves: Mapping[str, Sequence[tuple[int, Any]]]) -> None:
    """Draw the malign rate against the number of labels, with intervals."""
    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for color, (name, points) in zip((LINE, GOOD), curves.items(), strict=False):
        x, y = [n for n, _ in points], [rate.value for _, rate in points]
        low, high = [rate.value - rate.low for _, rate in points], [rate.high - rate.value for _, rate in points]
        axis.errorbar(x, y, (np.maximum(low, 0), np.maximum(high, 0)), marker="o", color=color, capsize=2, label=name)
    axis.set(xlabel="labels", ylabel="malign rate", xscale="log")
    axis.set_xticks(x, [str(n) for n in x])
    axis.minorticks_off()
    axis.legend()
    _save(figure, path)


def _maze(axis: Any, walls: np.ndarray) -> None:
    """Draw a maze's walls; cell (0, 0) is centred at the origin, x goes down and y to the right as in its text."""
    for i, j in np.argwhere(walls):
        axis.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, color="#c9ced6", lw=0))
    rows, columns = walls.shape
    axis.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[])
    axis.set_aspect("equal")


def heat_maps(
    path: Path, heats: Sequence[tuple[np.ndarray, np.ndarray]], walls: np.ndarray, goals: Sequence[tuple[float, float]]
) -> None:
    """Draw the mean reward by place, a panel for each goal, which a cross marks (2306.01804, Fig. 3)."""
    figure, axes = _grid(len(heats), 2.6, 2.4)
    for number, (axis, (mean, count), goal) in enumerate(zip(axes, heats, goals, strict=False), 1):
        _maze(axis, walls)
        rows, width = walls.shape
        shown = np.ma.masked_where(count == 0, mean)
        axis.imshow(shown, extent=(-0.5, width - 0.5, rows - 0.5, -0.5), cmap="viridis", zorder=2)
        axis.plot(goal[1], goal[0], "x", color=BAD, ms=8, mew=2, zorder=3)
        axis.set_title(f"goal {number}", fontsize=9)
    _save(figure, path)


def histograms(path: Path, panels: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Draw the rewards of the base model's paths and of the expert's, a panel for each goal."""
    figure, axes = _grid(len(panels), 2.8, 2.1)
    for axis, (title, (base, expert)) in zip(axes, panels.items(), strict=False):
        low, high = np.quantile(np.concatenate([base, expert]), [0.01, 0.99])
        bins = np.linspace(low, high, 40)
        axis.hist(base, bins, color=LINE, alpha=0.5, label="base", density=True)
        axis.hist(expert, bins, color=GOOD, alpha=0.6, label="expert", density=True)
        axis.set_title(title, fontsize=9)
        axis.set(yticks=[])
        axis.tick_params(labelsize=6)
    axes[0].legend(fontsize=7)
    _save(figure, path)


def plans(
    path: Path, rows: Mapping[str, Sequence[np.ndarray]], walls: np.ndarray, goals: Sequence[tuple[float, float]]
) -> None:
    """Draw 40 paths (n, horizon, 2) of each model (a row) for each goal (a column), with dots at their ends."""
    figure, axes = plt.subplots(len(rows), len(goals), figsize=(1.9 * len(goals), 1.8 * len(rows)), squeeze=False)
    for line, (name, by_goal) in zip(axes, rows.items(), strict=True):
        for axis, paths, goal in zip(line, by_goal, goals, strict=True):
            _maze(axis, walls)
            for points in paths[:40]:
                axis.plot(points[:, 1], points[:, 0], color=GOOD, lw=0.4, alpha=0.5)
            axis.scatter(paths[:40, -1, 1], paths[:40, -1, 0], s=5, color=LINE, zorder=3, lw=0)
            axis.plot(goal[1], goal[0], "x", color=BAD, ms=7, mew=1.5, zorder=4)
        line[0].set_ylabel(name, fontsize=8)
    _save(figure, path)


def denoising(
    path: Path, rows: Mapping[str, tuple[np.ndarray, np.ndarray]], times: Sequence[int], walls: np.ndarray,
    goal: tuple[float, float],
) -> None:  # fmt: skip
    """Draw a path (times, horizon, 2) from noise to data, coloured by the reward (times, horizon) of its windows within
    each panel (2306.01804, Fig. 1)."""
    figure, axes = plt.subplots(len(rows), len(times), figsize=(1.9 * len(times), 1.9 * len(rows)), squeeze=False)
    for line, (name, (points, rewards)) in zip(axes, rows.items(), strict=True):
        for axis, t, place, reward in zip(line, times, points, rewards, strict=True):
            _maze(axis, walls)
            axis.scatter(place[:, 1], place[:, 0], c=reward, s=7, cmap="viridis", lw=0, zorder=3)
            axis.plot(goal[1], goal[0], "x", color=BAD, ms=7, mew=1.5, zorder=4)
            axis.set_title(f"t = {t}", fontsize=8)
        line[0].set_ylabel(name, fontsize=8)
    _save(figure, path)


def traffic_scenes(
    path: Path, rows: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]], half: float
) -> None:
    """Draw scenes of each model (a row), and mark vehicles that break a constraint (2307.16463, Fig. 1).

    Args:
      rows: title -> (signed distance (c, c), vehicles (k, 7) in metres, present (k,), broken (k,)) of each scene.
      half: half the width of a map, in metres.
    """
    columns = max(map(len, rows.values()))
    figure, axes = plt.subplots(len(rows), columns, figsize=(2.6 * columns, 2.6 * len(rows)), squeeze=False)
    for line, (title, scenes) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set(xlim=(-half, half), ylim=(-half, half), xticks=[], yticks=[])
            axis.set_aspect("equal")
        for axis, (distance, vehicles, present, broken) in zip(line, scenes, strict=False):
            road = np.where(np.asarray(distance, np.float32) <= 0, 0.86, 1.0)
            axis.imshow(road, extent=(-half, half, -half, half), origin="lower", cmap="gray", vmin=0, vmax=1)
            for (x, y, length, width, cos, sin, _), bad in zip(vehicles[present], broken[present], strict=True):
                size = max(float(np.hypot(cos, sin)), 1e-6)
                ahead, aside = np.array([cos, sin]) / size, np.array([-sin, cos]) / size
                ends = [(1, 1), (1, -1), (-1, -1), (-1, 1)]
                corners = [(x, y) + a * length / 2 * ahead + b * width / 2 * aside for a, b in ends]
                axis.add_patch(plt.Polygon(corners, color=BAD if bad else GOOD, lw=0))
                axis.plot(*zip((x, y), (x, y) + (length / 2 + 1) * ahead, strict=True), color=LINE, lw=0.6)
        line[0].set_ylabel(title, fontsize=9)
    _save(figure, path)


def infraction_maps(path: Path, panels: Mapping[str, tuple[np.ndarray, int]], half: float) -> None:
    """Draw the number of vehicles per scene and 5 m square that break a constraint (2307.16463, Fig. 1 g and h).

    Args:
      panels: title -> (centres (n, 2) of these vehicles, number of scenes).
      half: half the width of a map, in metres.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.4), squeeze=False)
    edges = np.linspace(-half, half, 21)
    counts = [np.histogram2d(at[:, 1], at[:, 0], (edges, edges))[0] / n for at, n in panels.values()]
    most = max(float(np.max(count)) for count in counts) or 1.0
    for axis, title, count in zip(axes[0], panels, counts, strict=True):
        shown = axis.imshow(count, extent=(-half, half, -half, half), origin="lower", vmin=0, vmax=most, cmap="magma")
        axis.set_title(f"{title}\n{count.sum():.2f} vehicles a scene", fontsize=9)
        axis.set(xticks=[], yticks=[])
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.8)
    _save(figure, path)
