"""TFDS builders for the project's data sets, in ArrayRecord files, without TensorFlow.

    builders.Checkerboard(data_dir=FOLDER).download_and_prepare()
    tfds.data_source("checkerboard", split="train", data_dir=FOLDER)

The second line reads the files without this package and gives random access, also to Grain.  The builder of simulated
traffic is `gendiff.data.traffic_tfds`.  TFDS's own `mnist` has all ten digits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, get_args

import jax
import numpy as np
import tensorflow_datasets as tfds

from gendiff import check
from gendiff.data import checkerboard, commonroad, drawn_sevens, episodes, maze2d, mazes, mnist, traffic
from gendiff.data.traffic import Cut, Scenes

Row: TypeAlias = Mapping[str, Any]
Examples: TypeAlias = Callable[[], Iterator[tuple[Any, Row]]]
"""A function that yields the keys and rows of one shard."""


class Builder(tfds.core.ShardBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Base class of the builders; it writes the rows of a split in their order.

    A subclass defines SPLITS, `_features` and `_rows`.  The builder does not shuffle, because TFDS's shuffling needs
    TensorFlow beyond 1 GB.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: Mapping[str, str] = {"1.0.0": "First version."}
    SPLITS: ClassVar[Sequence[str]] = ("train",)
    ABOUT: ClassVar[str]
    HOMEPAGE: ClassVar[str | None] = None

    def __init__(self, *, file_format: str = "array_record", **arguments: Any) -> None:
        super().__init__(file_format=file_format, **arguments)

    def _features(self) -> dict[str, Any]:
        raise NotImplementedError

    def _rows(self, split: str) -> Iterable[Row]:
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.ABOUT,
            homepage=self.HOMEPAGE,
            features=tfds.features.FeaturesDict(self._features()),
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Examples]]:
        return {split: [partial(enumerate, self._rows(split))] for split in self.SPLITS}  # type: ignore[dict-item]


def _tensor(*shape: int | None, dtype: Any = np.float32, doc: str) -> Any:
    # Encoding "bytes", because TFDS stores types below 32 bits as 32-bit numbers, which are slow to read.
    encoding = "none" if None in shape or np.dtype(dtype) not in (np.uint8, np.float16) else "bytes"
    return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding, doc=doc)


@dataclass(eq=False, kw_only=True)
class Board(tfds.core.BuilderConfig):
    """Points of a checkerboard; see `gendiff.data.checkerboard`."""

    points: Mapping[str, int] = field(default_factory=lambda: {"train": 100_000, "test": 10_000})
    """Number of points of a split."""
    cells: int = 4
    half_width: float = 1.0
    seed: int = 0


class Checkerboard(Builder):
    """The data set `checkerboard`."""

    SPLITS = ("train", "test")
    ABOUT = "Points uniform on the filled cells of a checkerboard."
    BUILDER_CONFIGS: Sequence[Board] = [Board(name="default", description="4 x 4 cells on [-1, 1)^2.")]

    def _features(self) -> dict[str, Any]:
        return {"point": _tensor(2, doc="x, y")}

    def _rows(self, split: str) -> Iterable[Row]:
        board = self.builder_config
        check.number("checkerboard: seed", board.seed, at_least=0, below=2**32, whole=True)
        key = jax.random.fold_in(jax.random.key(board.seed), self.SPLITS.index(split))
        points = checkerboard.draw(key, board.points[split], board.cells, board.half_width)
        return ({"point": point} for point in np.asarray(points))


@dataclass(eq=False, kw_only=True)
class Strokes(tfds.core.BuilderConfig):
    """Configuration of the data set `sevens`."""

    share: float | None = None
    """Share of sevens with a drawn stroke, without naturally crossed sevens; None: all of MNIST's sevens, unchanged."""
    seed: int = 0


class Sevens(Builder):
    """The data set `sevens`.

    Args:
      place: folder with MNIST's files; for the default see `gendiff.data.mnist.read`.
    """

    SPLITS = ("train", "test")
    ABOUT = "MNIST's sevens, with and without a stroke across their stem."
    HOMEPAGE = "https://doi.org/10.1109/5.726791"
    BUILDER_CONFIGS: Sequence[Strokes] = [
        Strokes(name="own", description="MNIST's sevens, unchanged; their writers crossed some of them."),
        Strokes(name="mix", description="Sevens that no writer crossed; 12 % have a drawn stroke.", share=0.12),
    ]

    def __init__(self, *, place: Path | None = None, **arguments: Any) -> None:
        self.place = place
        super().__init__(**arguments)

    def _features(self) -> dict[str, Any]:
        return {
            "image": _tensor(mnist.SIDE, mnist.SIDE, dtype=np.uint8, doc="0..255, 255 is ink"),
            "crossed": tfds.features.Scalar(dtype=np.bool_, doc="whether a stroke crosses the stem"),
            "source": tfds.features.Scalar(dtype=np.int64, doc="number among the split's sevens"),
        }

    def _rows(self, split: str) -> Iterable[Row]:
        sevens, strokes = mnist.read(7, split, self.place), self.builder_config  # type: ignore[arg-type]
        if strokes.share is None:
            parts = mnist.Mix(sevens, mnist.naturally_crossed(sevens), np.arange(len(sevens)))
        else:
            parts = mnist.mix(sevens, strokes.share, strokes.seed)
        names = ("image", "crossed", "source")
        return (dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True))


class DrawnSevens(Builder):
    """The data set `drawn_sevens`: synthetic sevens, which the smoke presets use in place of MNIST's."""

    SPLITS = ("train", "test")
    ABOUT = "Synthetic sevens without a stroke across their stem."
    SIZES: ClassVar[Mapping[str, tuple[int, int]]] = {"train": (1000, 1), "test": (400, 2)}
    """Number and seed of a split's sevens."""

    def _features(self) -> dict[str, Any]:
        side = drawn_sevens.SIDE
        return {"image": _tensor(side, side, dtype=np.uint8, doc="0..255, 255 is ink")}

    def _rows(self, split: str) -> Iterable[Row]:
        return ({"image": image} for image in drawn_sevens.draw(*self.SIZES[split]))


# Episodes of control.


def _episode(observations: int, actions: int) -> dict[str, Any]:
    return {
        "observations": _tensor(None, observations, doc="observation of a step"),
        "actions": _tensor(None, actions, doc="action taken after the observation of the same step"),
    }


class ControlEpisodes(Builder):
    """The data set `control_episodes`: episodes in memory, such as a file of D4RL or Minari.

        files = episodes.d4rl(path)
        builders.ControlEpisodes(episodes=files, data_dir=FOLDER).download_and_prepare()

    Args:
      episodes: see `gendiff.data.episodes`.
    """

    ABOUT = "Episodes of control."

    def __init__(self, *, episodes: episodes.Episodes, **arguments: Any) -> None:
        self.episodes = episodes
        super().__init__(**arguments)

    def _features(self) -> dict[str, Any]:
        return _episode(self.episodes.observations.shape[1], self.episodes.actions.shape[1])

    def _rows(self, split: str) -> Iterable[Row]:
        source = episodes.Source(self.episodes)
        return (source[i] for i in range(len(source)))


@dataclass(eq=False, kw_only=True)
class Drive(tfds.core.BuilderConfig):
    """Maze and goal of the controller; see `gendiff.data.maze2d.generate`."""

    maze: str
    goal: mazes.Goal | None = None
    transitions: int = 1_000_000
    seed: int = 0


class Maze2d(Builder):
    """The data set `maze2d`.  MuJoCo simulates it, and is not needed to read it."""

    ABOUT = "Episodes of a point mass that a controller drives through a maze."
    HOMEPAGE = "https://github.com/Farama-Foundation/D4RL"
    BUILDER_CONFIGS: Sequence[Drive] = [
        *(Drive(name=name, description="Random goals.", maze=name) for name in mazes.MAZES),
        *(
            Drive(name=f"{name}-goal-{i}", description=f"All episodes drive to goal {i}.", maze=name, goal=goal)
            for name, maze in mazes.MAZES.items()
            for i, goal in enumerate(maze.goals, 1)
        ),
    ]
    DEFAULT_BUILDER_CONFIG_NAME = "umaze"

    def _features(self) -> dict[str, Any]:
        return _episode(4, 2)

    def _rows(self, split: str) -> Iterable[Row]:
        drive = self.builder_config
        source = episodes.Source(maze2d.generate(drive.maze, drive.transitions, drive.seed, drive.goal))
        return (source[i] for i in range(len(source)))


# Scenes of traffic.


def scene(cells: int) -> dict[str, Any]:
    """Return the TFDS features of a scene whose map has cells x cells cells."""
    return {
        "vehicles": _tensor(
            traffic.VEHICLES,
            7,
            doc="x, y, length, width in metres, cos and sin of the yaw, speed in m/s; zeros in rows without a vehicle",
        ),
        "present": _tensor(traffic.VEHICLES, dtype=np.bool_, doc="true for rows with a vehicle"),
        "distance": _tensor(
            cells,
            cells,
            dtype=np.float16,
            doc=f"metres to the edge of the drivable area, negative inside, clipped to +-{traffic.REACH:.0f}",
        ),
        "window": _tensor(3, doc="centre in metres and angle in radians, in the map's frame"),
        "world": tfds.features.Scalar(dtype=np.int64, doc="number of the map"),
    }


def scene_rows(scenes: Scenes) -> Iterator[dict[str, Any]]:
    """Yield the scenes one by one, as rows."""
    return (dict(zip(Scenes._fields, row, strict=True)) for row in zip(*scenes, strict=True))


class EmbeddedTraffic(Builder):
    """The data set `embedded_traffic`: the scenes in the package."""

    SPLITS = get_args(traffic.Split)
    ABOUT = "A few hundred scenes of vehicles on junctions and roundabouts, simulated by SUMO; coarse maps."
    HOMEPAGE = "https://eclipse.dev/sumo"

    def _features(self) -> dict[str, Any]:
        return scene(traffic.SMOKE_CELLS)

    def _rows(self, split: str) -> Iterable[Row]:
        return scene_rows(traffic.embedded(split))  # type: ignore[arg-type]


class RecordedTraffic(Builder):
    """The data set `recorded_traffic`: scenes from CommonRoad files.

    Args:
      files: a file or a folder; see `gendiff.data.commonroad.scenes`.
      cut: parameters of the windows.
    """

    ABOUT = "Scenes of recorded vehicles, cut from files of CommonRoad."
    HOMEPAGE = "https://commonroad.in.tum.de"

    def __init__(self, *, files: Path | str, cut: Cut = Cut(), **arguments: Any) -> None:  # noqa: B008 (immutable)
        self.files, self.cut = files, cut
        super().__init__(**arguments)

    def _features(self) -> dict[str, Any]:
        return scene(self.cut.cells)

    def _rows(self, split: str) -> Iterable[Row]:
        return scene_rows(commonroad.scenes(self.files, self.cut))
