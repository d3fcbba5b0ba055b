"""Pictures of samples, one function per kind.  Plots are SVG in mid tones, for light and dark pages."""

import io
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from scipy.sparse import csgraph

from gendiff.feedback.pictures import pillow
from gendiff.feedback.samples import Samples

EXACT, SIDE = 256, 512
"""Pixels of the longer side: the largest image that the grid shows unchanged, and smaller copies of larger images."""
CLOUD, PATHS, FRAMES = 2000, 200, 120
"""Largest numbers of drawn points, trajectories and frames."""
FPS = 20
INK, FAINT = "#8b5cf6", "#8a919c"
Up: TypeAlias = Literal["y", "z"]


class Picture(NamedTuple):
    """An encoded picture."""

    body: bytes
    media: str
    """Its media type."""


class Frame(NamedTuple):
    """A square window in the plane, common to all samples of a set."""

    centre: np.ndarray
    """(2,)."""
    half: float

    def place(self, points: np.ndarray) -> np.ndarray:
        """Map coordinates (..., 2), y upwards, to the SVG's box of 100 x 100."""
        return 50 + 50 * (points - self.centre) / self.half * np.array([1, -1])


class Drawing(NamedTuple):
    """Functions and data to draw the samples of a set."""

    draw: Callable[[int, bool], Picture]
    """A function (index, whole) -> picture; whole=False shrinks large images."""
    backdrop: Picture | None
    """Common picture behind all samples."""


def drawing(samples: Samples, up: Up = "y") -> Drawing:
    """Return the drawing of the samples' kind, with their common window, bones and backdrop."""
    if samples.kind == "image":
        return Drawing(lambda i, whole: image(samples[i], whole), None)
    array = np.asarray(samples.source)
    if samples.kind == "motion":
        joined = bones(array, samples.parents)
        return Drawing(lambda i, whole: motion(samples[i], joined, up), None)
    window = frame(array)
    if samples.kind == "point":
        return Drawing(lambda i, whole: point(samples[i], window), cloud(array, window))
    return Drawing(lambda i, whole: trajectory(samples[i], window), paths(array, window))


def image(sample: np.ndarray, whole: bool = False) -> Picture:
    """Encode (H, W) or (H, W, 1, 3 or 4), uint8 or float in [-1, 1], as PNG; shrink large images unless `whole`.

    Shrunk images are JPEG, or PNG if they are transparent.  Of uint16 the picture shows the upper byte.
    """
    if sample.dtype == np.uint16:
        sample = (sample >> 8).astype(np.uint8)
    elif sample.dtype != np.uint8:
        sample = sample.astype(np.promote_types(sample.dtype, np.float32))  # because float16 would round again
        sample = np.floor((np.clip(sample, -1, 1) + 1) * 127.5 + 0.5).astype(np.uint8)
    picture = pillow().Image.fromarray(sample[..., 0] if sample.shape[2:] == (1,) else sample)
    copy = not whole and max(picture.size) > EXACT
    if copy:
        picture.thumbnail((SIDE, SIDE))
    encoding = "JPEG" if copy and picture.mode != "RGBA" else "PNG"  # JPEG knows no transparency
    body = io.BytesIO()
    picture.save(body, encoding, quality=90)
    return Picture(body.getvalue(), f"image/{encoding.lower()}")


def point(sample: np.ndarray, window: Frame) -> Picture:
    """Draw a point (2,), in front of the `cloud` of all points."""
    x, y = window.place(sample)
    ring = f'<circle cx="{x:.2f}" cy="{y:.2f}" r="6" fill="none" stroke="{INK}" stroke-opacity=".5"/>'
    return _svg(ring + f'<circle cx="{x:.2f}" cy="{y:.2f}" r="2.6" fill="{INK}"/>')


def cloud(points: np.ndarray, window: Frame) -> Picture:
    """Draw at most CLOUD of the points (N, 2), and the axes."""
    dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in window.place(_some(points, CLOUD)))
    return _svg(_axes(window) + f'<path d="{dots}" stroke="{FAINT}" stroke-width="1.3" stroke-linecap="round"/>')


def trajectory(sample: np.ndarray, window: Frame) -> Picture:
    """Draw a path (T, 2) from a dot to a ring."""
    placed = window.place(sample)
    (x, y), (u, v) = placed[0], placed[-1]
    line = f'<path d="{_line(placed)}" fill="none" stroke="{INK}" stroke-width="1.8" stroke-linejoin="round"/>'
    start = f'<circle cx="{x:.2f}" cy="{y:.2f}" r="2.8" fill="{INK}"/>'
    end = f'<circle cx="{u:.2f}" cy="{v:.2f}" r="2.8" fill="none" stroke="{INK}" stroke-width="1.5"/>'
    return _svg(line + start + end)


def paths(trajectories: np.ndarray, window: Frame) -> Picture:
    """Draw at most PATHS of the trajectories (N, T, 2), faint, and the axes."""
    lines = "".join(_line(window.place(path)) for path in _some(trajectories, PATHS))
    return _svg(_axes(window) + f'<path d="{lines}" fill="none" stroke="{FAINT}" stroke-width=".5" opacity=".35"/>')


def motion(sample: np.ndarray, joined: np.ndarray, up: Up = "y") -> Picture:
    """Draw an animated stick figure (T, J, 3) and five faint stills, seen from the side and slightly above.

    Args:
      sample: joint positions in any unit.
      joined: (B, 2) pairs of joints.
      up: the vertical axis.
    """
    flat = _projected(sample[:: max(1, -(-len(sample) // FRAMES))], up)
    placed = frame(flat).place(flat)
    figures = ["".join(_line(moment[pair]) for pair in joined) for moment in placed]
    ghosts = "".join(figures[i] for i in np.unique(np.linspace(0, len(figures) - 1, 5).astype(int)))
    drawn = f'stroke-linecap="round" fill="none" d="{figures[0]}" stroke="{INK}" stroke-width="1.8"'
    moves = f'<animate attributeName="d" dur="{len(sample) / FPS:.2f}s" repeatCount="indefinite"'
    return _svg(
        f'<path d="{ghosts}" fill="none" stroke="{FAINT}" stroke-width=".8" opacity=".45"/>'
        f'<path {drawn}>{moves} values="{";".join(figures)}"/></path>'
    )


def bones(motions: np.ndarray, parents: np.ndarray | None = None) -> np.ndarray:
    """Return pairs of connected joints (B, 2) of motions (N, T, J, 3), from `parents` or by a guess.

    The guess is a minimum spanning tree over a few motions.  The cost of two joints is the standard deviation of their
    distance plus a tenth of its mean, because bones are stiff and short.
    """
    if parents is not None:
        return np.array([(joint, parent) for joint, parent in enumerate(parents) if parent >= 0]).reshape(-1, 2)
    some = _some(motions, 20).astype(np.float64).reshape(-1, *motions.shape[2:])
    apart = np.linalg.norm(some[:, :, None] - some[:, None], axis=-1)
    cost = apart.std(0) + 0.1 * apart.mean(0)
    tree = csgraph.minimum_spanning_tree(1 + cost / (np.max(cost) or 1))  # 1 +, because to SciPy 0 is no edge
    return np.stack(tree.nonzero(), axis=1)


def frame(points: np.ndarray) -> Frame:
    """Return the smallest square around float points (..., 2), with a margin; its width exceeds their rounding."""
    flat = points.reshape(-1, 2).astype(np.float64)
    low, high = flat.min(0), flat.max(0)
    # A lower bound of the width, so that points which differ only by rounding look equal.
    rounding = 8 * float(np.finfo(points.dtype).eps) * max(np.abs(low).max(), np.abs(high).max())
    return Frame((low + high) / 2, max(0.56 * float(np.max(high - low)), rounding) or 1.0)


def _projected(sample: np.ndarray, up: Up) -> np.ndarray:
    """Project (T, J, 3) to (T, J, 2): turn by 35 degrees, look from 12 degrees above."""
    turn, above = np.deg2rad(35), np.deg2rad(12)
    first, vertical, second = (0, 1, 2) if up == "y" else (1, 2, 0)
    across = np.cos(turn) * sample[..., first] + np.sin(turn) * sample[..., second]
    away = np.sin(turn) * sample[..., first] - np.cos(turn) * sample[..., second]
    return np.stack([across, np.cos(above) * sample[..., vertical] + np.sin(above) * away], axis=-1)


def _some(rows: np.ndarray, most: int) -> np.ndarray:
    return rows[:: max(1, -(-len(rows) // most))]


def _axes(window: Frame) -> str:
    x, y = window.place(np.zeros(2)).clip(-1, 101)
    return f'<path d="M{x:.1f} 0V100M0 {y:.1f}H100" stroke="{FAINT}" stroke-width=".4" stroke-dasharray="1 2"/>'


def _line(points: np.ndarray) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _svg(content: str) -> Picture:
    body = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{content}</svg>'
    return Picture(body.encode(), "image/svg+xml")
