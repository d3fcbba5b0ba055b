"""Scenes of traffic as a data set of TFDS in ArrayRecord files, made and read without TensorFlow.

`python -m gendiff.data.traffic_tfds FOLDER --config default` makes it.  Then `scenes` loads a split into memory, and

    tfds.data_source("traffic/default", split="train", data_dir=FOLDER)

gives random access to it, also for Grain.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from gendiff import command, distributed
from gendiff.data import files, regular, sumo, traffic
from gendiff.data.builders import Builder, Examples, scene, scene_rows
from gendiff.data.traffic import Recipe, Scenes, Split

try:
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordReader
except ImportError as error:
    raise ImportError(f"traffic_tfds: TFDS must be installed, got none ({error}): pip install array-record") from None

MAPS = 32
"""Maps of a shard at most: about 2,900 scenes and 70 MB."""
Report: TypeAlias = Callable[[str, int], Any]
"""Called with what was done, `simulated` or `packed`, and the number of scenes so far."""


@dataclass(eq=False, kw_only=True)
class Config(tfds.core.BuilderConfig):
    """Which scenes, and how many of them."""

    scenes: int
    most: int | None = None
    """Of one map at most, so that they are of more maps."""
    recipe: Recipe = traffic.LONG


class Traffic(Builder):
    """The data set `traffic`; maps, not scenes, are split into train, validation and test.

    Maps are simulated into `downloads/traffic_maps` of the data's folder, which all configurations share: one file a
    map, so that after a kill the same call goes on.  Packing takes a minute for 100,000 scenes, and begins anew; what a
    kill leaves of it is a folder `incomplete..`, to be deleted.  The same maps give the same files.

    Shards are written as their maps are read.
    """

    __module__ = "gendiff.data.traffic_tfds"  # which the files name, also where this one runs as a program
    ABOUT = "Scenes of vehicles on junctions and roundabouts in windows of 100 m, simulated by SUMO."
    HOMEPAGE = "https://eclipse.dev/sumo"
    RELEASE_NOTES: Mapping[str, str] = {"1.0.0": "Junctions and roundabouts, seed 0."}
    BUILDER_CONFIGS: Sequence[Config] = [
        Config(
            name="smoke",
            description="A few scenes each of 20 maps, in a minute: those of traffic.embedded, in full.",
            scenes=traffic.SMOKE,
            most=traffic.SMOKE_MOST,
        ),
        Config(name="default", description="For results on two cores, in minutes.", scenes=8_000),
        Config(name="paper", description="For an accelerator.", scenes=100_000),
    ]
    DEFAULT_BUILDER_CONFIG_NAME = "default"

    def __init__(
        self,
        *,
        workers: int | None = None,
        report: Report = lambda what, scenes: None,
        **given: Any,
    ) -> None:
        super().__init__(**given)
        self.workers, self.report = workers, report

    def _features(self) -> dict[str, Any]:
        return scene(self.builder_config.recipe.cut.cells)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Examples]]:
        config, folder = self.builder_config, Path(self.data_dir_root) / "downloads" / "traffic_maps"
        maps = traffic.write(
            folder, config.scenes, config.recipe, self.workers, partial(self.report, "simulated"), config.most
        )
        sizes = [traffic.counted(folder, number, config.most) for number in range(maps)]
        sizes[-1] -= sum(sizes) - config.scenes
        packed = 0

        def examples(numbers: Int[np.ndarray, " maps"]) -> Iterator[tuple[str, dict[str, Any]]]:
            nonlocal packed
            for number in numbers:
                scenes = traffic.stored(folder, number, config.most)
                for i, row in zip(range(sizes[number]), scene_rows(scenes), strict=False):
                    yield f"{number}-{i}", row
                packed += sizes[number]
                self.report("packed", packed)

        shards: dict[str, list[Examples]] = {}
        for split in get_args(Split):
            numbers = [number for number, size in enumerate(sizes) if size and traffic.split_of(number) == split]
            if not numbers:
                raise ValueError(f"traffic_tfds: expected scenes of {split}, given {config.scenes} of {maps} maps")
            shards[split] = [partial(examples, part) for part in np.array_split(numbers, -(-len(numbers) // MAPS))]
        return shards


def scenes(data_dir: Path, config: str = "default", split: Split = "train") -> Scenes:
    """All scenes of a split in memory, in the order of their maps: 33 KB each.

    Args:
      data_dir: folder of the data sets of TFDS.
      config: smoke, default or paper.

    Raises:
      ValueError: there is no such data set or split, or a file is missing or damaged.
    """
    if split not in get_args(Split):
        raise ValueError(f"traffic_tfds: split: expected one of {', '.join(get_args(Split))}, given {split!r}")
    folder = Path(data_dir) / Traffic.name / config / str(Traffic.VERSION)
    if not folder.exists():
        raise ValueError(
            f"traffic_tfds: {folder}: expected a data set, given no such folder; "
            f"`python -m gendiff.data.traffic_tfds {data_dir} --config {config}` makes one"
        )
    try:
        info = tfds.builder_from_directory(folder).info
        shards = info.splits[split]
        files = list(zip(shards.filepaths, shards.shard_lengths, strict=True))
        cells = info.features["distance"].shape[0]
    except Exception as error:  # TFDS raises many types
        raise ValueError(f"traffic_tfds: {folder}: expected a data set, given {error!r}") from None
    kinds = traffic.empty(Recipe().cut._replace(cells=cells))
    out = Scenes(*(np.empty((shards.num_examples, *kind.shape[1:]), kind.dtype) for kind in kinds))
    first = 0
    for path, length in files:
        for i, row in enumerate(_shard(Path(path), length, split, info.features), first):
            for name, part in zip(Scenes._fields, out, strict=True):
                part[i] = row[name]
        first += length
    return out


def _shard(path: Path, length: int, split: Split, features: Any) -> list[dict[str, Any]]:
    try:
        records = ArrayRecordReader(str(regular(path))).read_all()
        rows = [features.deserialize_example_np(record) for record in records]
        found = {traffic.split_of(row["world"]) for row in rows}
    except Exception as error:  # of several kinds
        raise ValueError(f"traffic_tfds: {path}: expected a whole shard, given a damaged one ({error!r})") from None
    if len(rows) != length or found != {split}:
        raise ValueError(
            f"traffic_tfds: {path}: expected {length} scenes of {split}, given {len(rows)} of {' and '.join(found)}"
        )
    return rows


def main() -> None:
    """Makes the data set from the command line."""
    parser = argparse.ArgumentParser(
        "python -m gendiff.data.traffic_tfds", description="Simulates and packs scenes; goes on if stopped."
    )
    parser.add_argument(
        "folder", type=files.argument, help="of the data sets of TFDS; its downloads/traffic_maps holds the maps"
    )
    parser.add_argument("--config", choices=Traffic.builder_configs, default=Traffic.DEFAULT_BUILDER_CONFIG_NAME)
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    given = parser.parse_args()
    command.heed()
    total = Traffic.builder_configs[given.config].scenes
    bars: dict[str, tqdm] = {}

    def report(what: str, have: int) -> None:
        distributed.stop_if_noticed("every map that was finished")
        if what not in bars:
            for bar in bars.values():
                bar.close()
            # From here, so that the rate is of what is made now.
            bars[what] = tqdm(total=total, initial=have, desc=what, unit=" scenes")
        bars[what].update(have - bars[what].n)

    builder = Traffic(data_dir=given.folder, config=given.config, workers=given.workers, report=report)
    try:
        builder.download_and_prepare()
    except (ValueError, OSError, sumo.SumoError) as error:
        parser.error(str(error))
    except distributed.Preempted as error:
        tqdm.write(str(error), file=sys.stderr)
        raise SystemExit(error.status) from None
    finally:
        for bar in bars.values():
            bar.close()
    sizes = ", ".join(f"{builder.info.splits[split].num_examples} {split}" for split in get_args(Split))
    command.say(f"{builder.data_dir}: {sizes}")


if __name__ == "__main__":
    main()
