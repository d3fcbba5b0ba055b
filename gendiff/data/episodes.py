"""Episodes of control: storage that survives a kill, and readers for D4RL and Minari.

A row is a step: an observation, and the action taken after it.  `gendiff.data.windows` cuts windows for training.
"""

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int

from gendiff import check
from gendiff.data import DataError, files, regular

PATIENCE = 2000
"""Discarded attempts in a row that end the search with an error."""
SHARD = "a whole shard"


class Episodes(NamedTuple):
    """Episodes, concatenated along the rows."""

    observations: Float[np.ndarray, "n o"]
    actions: Float[np.ndarray, "n a"]
    """Actions of the controller, before the environment clips them."""
    lengths: Int[np.ndarray, " e"]
    """Numbers of rows of the episodes, >= 1, with sum n."""


Attempt: TypeAlias = tuple[np.ndarray, np.ndarray] | None
"""Observations and actions of an episode; None if it was discarded."""
Attempts: TypeAlias = Generator[Attempt, None, None]
"""Endless attempts."""
Report: TypeAlias = Callable[[int], Any]
"""A function of the number of rows so far, called at the start and after every kept episode."""


class Source:
    """Random access to complete episodes, in the form of `tfds.data_source`, for Grain."""

    def __init__(self, episodes: Episodes) -> None:
        self.episodes = episodes
        self.ends = np.cumsum(episodes.lengths)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not -len(self) <= i < len(self):
            raise IndexError(f"episodes: index must be below {len(self)}, got {i}")
        rows = slice(self.ends[i] - self.episodes.lengths[i], self.ends[i])
        return {"observations": self.episodes.observations[rows], "actions": self.episodes.actions[rows]}


# Generating and storing.


def take(attempts: Attempts, transitions: int, report: Report = lambda rows: None) -> tuple[Episodes, int]:
    """Collect kept attempts until they have `transitions` rows or more; the last episode stays complete.

    Args:
      attempts: endless attempts.
      transitions: least number of rows, 1 or more.
      report: see `Report`.

    Returns:
      The episodes in float32, and the number of attempts, with the discarded ones.

    Raises:
      ValueError: `transitions` is below 1, 2,000 attempts in a row were discarded, or the attempts end.
      DataError: an attempt has no rows, differs in its shapes, or is not finite.
    """
    check.number("episodes: transitions", transitions, at_least=1, whole=True)
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    rows = tried = failed = 0
    while rows < transitions:
        try:
            attempt = next(attempts)
        except StopIteration:
            raise ValueError(f"episodes: attempts must go on to {transitions} rows, got {rows} of {tried}") from None
        tried, failed = tried + 1, failed + 1
        if attempt is not None:
            kept.append(attempt)
            if not len(attempt[0]):  # without rows the loop would not end
                raise DataError(f"episodes: attempt {tried} must have a row or more, got none")
            rows, failed = rows + len(attempt[0]), 0
            report(rows)
        elif failed == PATIENCE:
            raise ValueError(f"episodes: an attempt must be kept, got {PATIENCE} discarded ones in a row")
    return _joined("episodes", kept), tried


class Holds(NamedTuple):
    """Numbers of shards, episodes, rows and attempts in a folder."""

    shards: int = 0
    episodes: int = 0
    transitions: int = 0
    attempts: int = 0


def write(
    folder: Path,
    configuration: dict[str, Any],
    attempts: Callable[[int], Attempts],
    transitions: int,
    shard: int = 100_000,
    report: Report = lambda rows: None,
) -> Holds:
    """Generate and store episodes with `transitions` rows or more; after a kill, the same call resumes.

    Shards are written atomically.  `info.json` has the configuration, and after the last shard the counts of `Holds`.

    Args:
      folder: made if it is missing.
      configuration: all values that the episodes depend on, serialisable as JSON.
      attempts: function first -> attempts first, first + 1, ..; attempt i must not depend on first.
      transitions: least number of rows in all shards.
      shard: rows of one file; a few more, because episodes are not split.
      report: see `Report`.

    Raises:
      ValueError: the folder holds episodes of another configuration, or a damaged file.
    """
    check.number("episodes: transitions", transitions, at_least=1, whole=True)
    check.number("episodes: shard", shard, at_least=1, whole=True)
    # Through JSON and back, because JSON turns tuples into lists.
    configuration = json.loads(json.dumps({**configuration, "transitions": transitions, "shard": shard}))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "info.json").exists() and not _shards(folder):
        files.store_text(folder / "info.json", _json(configuration, None))
    found = _info(folder)["configuration"]
    if others := [name for name in {**configuration, **found} if configuration.get(name) != found.get(name)]:
        wanted, got = ({name: values.get(name) for name in others} for values in (configuration, found))
        raise ValueError(f"episodes: {folder} must be a folder of {wanted}, got one of {got}: name another folder")
    holds = Holds()
    for path in _shards(folder):
        holds = _plus(holds, *files.load(regular(path), SHARD, "lengths", "attempts"))
    report(holds.transitions)
    with closing(attempts(holds.attempts)) as stream:
        while (before := holds.transitions) < transitions:
            part, tried = take(
                stream, min(shard, transitions - before), lambda rows, before=before: report(before + rows)
            )
            save = lambda file, part=part, tried=tried: np.savez(file, attempts=tried, **part._asdict())
            files.store(folder / f"shard-{holds.shards:05d}.npz", save)
            holds = _plus(holds, part.lengths, tried)
    files.store_text(folder / "info.json", _json(configuration, holds))
    return holds


def read(folder: Path) -> Episodes:
    """Read all episodes that `write` stored.

    Raises:
      ValueError: the data set is missing, unfinished or damaged.
    """
    holds, shards = _info(folder)["holds"], _shards(folder)
    if holds is None or len(shards) != holds["shards"]:
        raise ValueError(
            f"episodes: {folder} must be a complete data set, got {len(shards)} shards of an unfinished one: run the "
            "command that writes it again"
        )
    parts = [_checked(str(path), Episodes(*files.load(regular(path), SHARD, *Episodes._fields))) for path in shards]
    return Episodes(*map(np.concatenate, zip(*parts, strict=True)))


def _plus(holds: Holds, lengths: np.ndarray, attempts: Any) -> Holds:
    more = (1, len(lengths), int(lengths.sum()), int(attempts))
    return Holds(*map(sum, zip(holds, more, strict=True)))


def _json(configuration: Any, holds: Holds | None) -> str:
    return json.dumps({"configuration": configuration, "holds": holds and holds._asdict()}, indent=1)


def _info(folder: Path) -> dict[str, Any]:
    try:
        info = json.loads(regular(folder / "info.json").read_text())
        return {"configuration": dict(info["configuration"]), "holds": info["holds"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"episodes: {folder} must have an info.json of episodes, got {error!r}") from None


def _shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("shard-*.npz"))
    wanted = [folder / f"shard-{i:05d}.npz" for i in range(len(found))]
    if found != wanted:
        names = [[path.name for path in paths] for paths in (wanted, found)]
        raise ValueError(f"episodes: shards of {folder} must be {names[0]}, got {names[1]}")
    return found


def _joined(where: str, attempts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Episodes:
    """Concatenate observations and actions of episodes in float32, and check them."""
    try:
        observations, actions = (np.concatenate(part, dtype=np.float32) for part in zip(*attempts, strict=True))
    except (TypeError, ValueError) as error:  # not numbers, or different widths
        raise DataError(f"{where}: episodes must have numbers of one width, got others ({error})") from None
    for number, (seen, taken) in enumerate(attempts):
        if len(seen) != len(taken):
            raise DataError(
                f"{where}: episode {number} must have as many observations as actions, got {len(seen)} and {len(taken)}"
            )
    return _checked(where, Episodes(observations, actions, np.array([len(seen) for seen, _ in attempts])))


def _checked(where: str, episodes: Episodes) -> Episodes:
    """Return the episodes; check that their shapes agree and their rows are finite.

    Raises:
      DataError: shapes differ, or a row is not finite: one NaN would spread through the normaliser to all rows.
    """
    observations, actions, lengths = episodes
    if observations.ndim != 2 or actions.ndim != 2 or len(observations) != len(actions):
        raise DataError(
            f"{where}: observations (n, o) and actions (n, a) must have one n, "
            f"got {observations.shape}, {actions.shape}"
        )
    if lengths.ndim != 1 or (lengths < 1).any() or lengths.sum() != len(actions):
        raise DataError(f"{where}: lengths must be >= 1 with sum {len(actions)}, got sum {lengths.sum()}")
    for name, rows in (("observations", observations), ("actions", actions)):
        _finite(where, name, rows)
    return episodes


def _finite(where: str, name: str, array: np.ndarray) -> None:
    try:
        check.number(f"{where}: {name}", array)
    except ValueError as error:
        raise DataError(str(error)) from None


# Readers of other formats.


def d4rl(path: Path) -> Episodes:
    """Read an HDF5 file of D4RL (Fu et al. 2020), or of the relative-reward paper's fork.

    An episode ends at a true row of `terminals` or `timeouts`.  If no row is true, it ends where `infos/goal` changes.
    Rows after the last end are left out, because they are no complete episode.

    Raises:
      DataError: the file is not HDF5 or damaged; arrays are missing, of different lengths or not finite; flags of ends
        are not Boolean; or no episode ends.
    """
    with _hdf5(path) as file:
        arrays = {name: _array(path, file, name) for name in ("observations", "actions", "terminals")}
        optional = {name: _array(path, file, name) for name in ("timeouts", "infos/goal") if name in file}
    sizes = {name: len(array) for name, array in (arrays | optional).items()}
    if len(set(sizes.values())) != 1:
        raise DataError(f"d4rl: {path}: arrays must have one length, got {sizes}")
    last = _ends(path, "terminals", arrays["terminals"])
    if "timeouts" in optional:
        last |= _ends(path, "timeouts", optional["timeouts"])
    if not last.any() and "infos/goal" in optional:
        # Check first, because a NaN differs from itself and would end an episode at every row.
        _finite(f"d4rl: {path}", "infos/goal", optional["infos/goal"])
        goals = optional["infos/goal"].reshape(len(last), -1)
        last[:-1] = (goals[1:] != goals[:-1]).any(1)
    ends = np.flatnonzero(last) + 1
    if not len(ends):
        raise DataError(f"d4rl: {path}: episodes must end, got no end in {len(last)} rows")
    rows = _joined(f"d4rl: {path}", [(arrays["observations"][: ends[-1]], arrays["actions"][: ends[-1]])])
    return rows._replace(lengths=np.diff(ends, prepend=0))


def _ends(path: Path, name: str, flags: np.ndarray) -> Bool[np.ndarray, " n"]:
    """Return flags (n,) or (n, 1) as Booleans; refuse NaN, because it is true in NumPy and would end an episode."""
    others = flags[~np.isin(flags, (0, 1))]
    if flags.size != len(flags) or flags.dtype.kind not in "biuf" or others.size:
        example = f" with {others[0]}" if others.size else ""
        raise DataError(f"d4rl: {path}: {name} must be (n,) true or false, got {flags.dtype} {flags.shape}{example}")
    return flags.astype(bool).ravel()


def minari(path: Path) -> Episodes:
    """Read a data set of Minari (0.5): its folder, or the `main_data.hdf5` in it.

    If observations are a dict (observation, achieved_goal, desired_goal), the function reads `observation`.  It leaves
    out the observation after the last action.  Axes of gymnasium-robotics' point mazes differ from D4RL's: the origin
    is the middle, x is the column and y points up.

    Raises:
      DataError: the file is missing or damaged, arrays are missing, of different widths or not finite, or no episode
        is found.
    """
    path = path / "data" / "main_data.hdf5" if path.is_dir() else path
    episodes = []
    with _hdf5(path) as file:
        for name in sorted((name for name in file if name.startswith("episode_")), key=lambda name: (len(name), name)):
            nested = f"{name}/observations/observation" in file
            seen = _array(path, file, f"{name}/observations{'/observation' if nested else ''}")
            done = _array(path, file, f"{name}/actions")
            if len(seen) != len(done) + 1:
                raise DataError(f"minari: {path}: {name} must have {len(done) + 1} observations, got {len(seen)}")
            episodes.append((seen[:-1], done))
    if not episodes:
        raise DataError(f"minari: {path} must have groups episode_0, episode_1 .., got none")
    return _joined(f"minari: {path}", episodes)


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError:
        raise ImportError("episodes: h5py must be installed, got none: pip install 'gendiff[maze]'") from None
    try:
        file = h5py.File(regular(path), "r")
    except OSError as error:
        raise DataError(f"episodes: {path} must be an HDF5 file, got {error}") from None
    with file:
        try:
            yield file
        except DataError:
            raise
        except Exception as error:  # damaged files raise many types
            raise DataError(f"episodes: {path} must be an intact HDF5 file, got a damaged one ({error})") from None


def _array(path: Path, file: Any, name: str) -> np.ndarray:
    """Read an array with one axis or more."""
    try:
        array: Any = file[name][()] if hasattr(file.get(name), "shape") else None
    except Exception as error:  # damaged files raise many types
        raise DataError(f"episodes: {path}: {name} must be an intact array, got a damaged one ({error})") from None
    if not np.ndim(array):
        raise DataError(f"episodes: {path} must have an array {name}, got {sorted(file)}")
    return np.asarray(array)
