"""Scenes of traffic as a TFDS data set in ArrayRecord files, without TensorFlow.

`python -m gendiff.data.traffic_tfds FOLDER --config default` makes it.  Then `scenes` loads a split into memory, and

    tfds.data_source("traffic/default", split="train", data_dir=FOLDER)

gives random access to it, also to Grain.
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
"""Maps per shard at most: about 2,900 scenes and 70 MB."""
Report: TypeAlias = Callable[[str, int], Any]
"""A function of the stage, `simulated` or `packed`, and the number of scenes so far."""


@dataclass(eq=False, kw_only=True)
class Config(tfds.core.BuilderConfig):
    """Number of scenes and their recipe."""

    scenes: int
    most: int | None = None
    """Scenes per map at most; a smaller number takes scenes from more maps."""
    recipe: Recipe = traffic.LONG


class Traffic(Builder):
    """The data set `traffic`; maps, not scenes, are split into train, validation and test.

    Maps are simulated into `downloads/traffic_maps` of the data's folder, which all configurations share.  A map is a
    file, so after a kill the same call resumes.  Packing takes a minute for 100,000 scenes, and restarts after a kill;
    delete the folder `incomplete..` that remains.  The same maps give the same files.
    """

    __module__ = "gendiff.data.traffic_tfds"  # not __main__, because the data set's files hold this name
    ABOUT = "Scenes of vehicles on junctions and roundabouts in windows of 100 m, simulated by SUMO."
    HOMEPAGE = "https://eclipse.dev/sumo"
    RELEASE_NOTES: Mapping[str, str] = {"1.0.0": "Junctions and roundabouts, seed 0."}
    BUILDER_CONFIGS: Sequence[Config] = [
        Config(
            name="smoke",
            description="A few scenes of each of 20 maps, in a minute: the scenes of traffic.embedded, unrounded.",
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
        report: Report = lambda stage, scenes: None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
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
                raise ValueError(
                    f"traffic_tfds: {split} must have scenes, got {config.scenes} scenes of {maps} maps without it"
                )
            shards[split] = [partial(examples, part) for part in np.array_split(numbers, -(-len(numbers) // MAPS))]
        return shards


def scenes(data_dir: Path, config: str = "default", split: Split = "train") -> Scenes:
    """Read all scenes of a split into memory, in the order of their maps; a scene takes 33 KB.

    Args:
      data_dir: folder of TFDS's data sets.
      config: smoke, default or paper.
      split: train, validation or test.

    Raises:
      ValueError: the data set or split is unknown, or a file is missing or damaged.
    """
    if split not in get_args(Split):
        raise ValueError(f"traffic_tfds: split must be {' or '.join(get_args(Split))}, got {split!r}")
    folder = Path(data_dir) / Traffic.name / config / str(Traffic.VERSION)
    if not folder.exists():
        raise ValueError(
            f"traffic_tfds: {folder} must be a data set, got no such folder: "
            f"`python -m gendiff.data.traffic_tfds {data_dir} --config {config}` makes it"
        )
    try:
        info = tfds.builder_from_directory(folder).info
        shards = info.splits[split]
        files = list(zip(shards.filepaths, shards.shard_lengths, strict=True))
        cells = info.features["distance"].shape[0]
    except Exception as error:  # TFDS raises many types
        raise ValueError(f"traffic_tfds: {folder} must be a data set, got {error!r}") from None
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
    except Exception as error:  # damaged shards raise several types
        raise ValueError(f"traffic_tfds: {path} must be an intact shard, got a damaged one ({error!r})") from None
    if len(rows) != length or found != {split}:
        raise ValueError(
            f"traffic_tfds: {path} must hold {length} scenes of {split}, got {len(rows)} of {' and '.join(found)}"
        )
    return rows


def main() -> None:
    """Make the data set from the command line."""
    parser = argparse.ArgumentParser(
        "python -m gendiff.data.traffic_tfds",
        description="Simulate and pack scenes; the same command resumes a stopped run.",
    )
    parser.add_argument(
        "folder", type=files.argument, help="folder of TFDS's data sets; its downloads/traffic_maps holds the maps"
    )
    parser.add_argument("--config", choices=Traffic.builder_configs, default=Traffic.DEFAULT_BUILDER_CONFIG_NAME)
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    options = parser.parse_args()
    command.heed()
    total = Traffic.builder_configs[options.config].scenes
    bars: dict[str, tqdm] = {}

    def report(stage: str, have: int) -> None:
        distributed.stop_if_noticed("every map that was finished")
        if stage not in bars:
            for bar in bars.values():
                bar.close()
            # `initial`, so that the rate does not count scenes of earlier runs.
            bars[stage] = tqdm(total=total, initial=have, desc=stage, unit=" scenes")
        bars[stage].update(have - bars[stage].n)

    builder = Traffic(data_dir=options.folder, config=options.config, workers=options.workers, report=report)
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
