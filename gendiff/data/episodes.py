"""Episodes of control: storage that survives a kill, readers for D4RL and Minari, and windows for training.

A row is a step: an observation, and the action taken after it.  A window is `horizon` rows of one episode, as
normalised (action, observation).  Diffuser (Janner et al. 2022) and the paper of relative rewards (NeurIPS 2023) train
on such windows.
"""

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gendiff import check
from gendiff.data import DataError, files, regular

LIMIT = 1000
"""Rows of an episode that windows use, from its start."""
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


# Windows for training.

Rows = TypeVar("Rows", np.ndarray, jax.Array)


class Normaliser(NamedTuple):
    """Least and largest values of (action, observation), per coordinate."""

    low: Float[np.ndarray, " d"]
    high: Float[np.ndarray, " d"]


def fit(episodes: Episodes, limit: int = LIMIT) -> Normaliser:
    """Fit the normaliser to the rows that windows use (`trimmed`), in float32 or wider.

    A constant coordinate gets low, high = value -+ max(1, |value| / 8192), because 1e8 + 1 rounds to 1e8 in float32.

    Raises:
      ValueError: no episode is long enough, a row is not finite, or high - low overflows.
    """
    rows = _rows(trimmed(episodes, limit))
    rows = rows.astype(np.promote_types(rows.dtype, np.float32))  # in 16 bits the difference may overflow
    check.number("episodes: rows", rows)
    low, high = rows.min(0), rows.max(0)
    width = np.where(low == high, np.maximum(1, np.abs(low) / 8192), 0).astype(rows.dtype)
    with np.errstate(over="ignore"):
        found = Normaliser(low - width, high + width)
        check.number("episodes: high - low", found.high - found.low, above=0)
    return found


def normalise(normaliser: Normaliser, rows: Rows) -> Rows:
    """Return 2 (x - low) / (high - low) - 1 of rows (.., d); in [-1, 1] for the rows of the fit."""
    low, high = _edges(normaliser, rows)
    return 2 * (rows - low) / (high - low) - 1


def unnormalise(normaliser: Normaliser, rows: Rows) -> Rows:
    """Invert `normalise` for rows (.., d), clipped to [-1, 1]."""
    low, high = _edges(normaliser, rows)
    return (rows.clip(-1, 1) + 1) / 2 * (high - low) + low


def _edges(normaliser: Normaliser, rows: Rows) -> Normaliser:
    """Return the normaliser with the rank of the rows, because JAX can be set to refuse rank promotion."""
    return Normaliser(*(edge.reshape((1,) * (rows.ndim - 1) + edge.shape) for edge in normaliser))


def trimmed(episodes: Episodes, limit: int = LIMIT) -> Episodes:
    """Drop the last row of all episodes, and cut them to `limit` rows; leave out episodes of fewer than two rows.

    Raises:
      ValueError: no episode is left, or `limit` is below 2.
    """
    check.number("episodes: limit", limit, at_least=2, whole=True)
    lengths = np.minimum(episodes.lengths - 1, limit)
    lengths = np.where(lengths > 1, lengths, 0)
    if not lengths.any():
        longest = max(episodes.lengths, default=0)
        raise ValueError(
            f"episodes: one must have 3 rows or more, got {len(lengths)} episodes, the longest of {longest} rows"
        )
    keep = _place(episodes.lengths) < np.repeat(lengths, episodes.lengths)
    return Episodes(episodes.observations[keep], episodes.actions[keep], lengths[lengths > 0])


def thinned(episodes: Episodes, stride: int) -> Episodes:
    """Keep every `stride`-th row of an episode, counted back from the last but one, because windows drop the last."""
    check.number("episodes: stride", stride, at_least=1, whole=True)
    from_end = np.repeat(episodes.lengths, episodes.lengths) - 1 - _place(episodes.lengths)
    keep = ((from_end - 1) % stride == 0) | (from_end == 0) if stride > 1 else np.ones(len(from_end), bool)
    owner = np.repeat(np.arange(len(episodes.lengths)), episodes.lengths)[keep]
    lengths = np.bincount(owner, minlength=len(episodes.lengths))
    return Episodes(episodes.observations[keep], episodes.actions[keep], lengths)


class Windows(NamedTuple):
    """The rows of a data set and the begins of its windows, as arguments of a compiled program."""

    rows: Float[np.ndarray, "n d"]
    """(action, observation), normalised."""
    begin: Int[np.ndarray, " w"]
    """First rows of the windows."""
    last: Int[np.ndarray, " w"]
    """Last rows of the windows' episodes."""
    still: Float[np.ndarray, " a"]
    """The action 0, normalised."""


def windows(episodes: Episodes, normaliser: Normaliser, horizon: int, limit: int = LIMIT) -> Windows:
    """Return all windows, repeated so that episodes of any length have about the same weight.

    Windows of an episode of L rows (`trimmed`) begin at its rows 0 .. M - 1, with M = max(L - horizon, 1).  They are
    repeated floor(max M / M) times, as in the paper's code.
    """
    check.number("windows: horizon", horizon, at_least=1, whole=True)
    used = trimmed(episodes, limit)
    starts = np.maximum(used.lengths - horizon, 1)
    repeated = starts.max() // starts * starts
    episode = np.repeat(np.arange(len(starts)), repeated)
    ends = np.cumsum(used.lengths)
    begin = (ends - used.lengths)[episode] + _place(repeated) % starts[episode]
    still = normalise(normaliser, np.zeros_like(normaliser.low))[: used.actions.shape[1]]
    rows = normalise(normaliser, _rows(used))
    return Windows(rows, begin.astype(np.int32), (ends - 1)[episode].astype(np.int32), still)


def window(source: Windows, i: int | Int[Array, ""], horizon: int) -> Float[Array, "horizon d"]:
    """Return window i.  After the end of its episode, the last observation is repeated and the action is 0."""
    check.number("window: horizon", horizon, at_least=1, whole=True)
    row = jnp.take(source.begin, i) + jnp.arange(horizon)
    last = jnp.take(source.last, i)
    rows = jnp.take(source.rows, jnp.minimum(row, last), 0)
    actions = len(source.still)
    done = jnp.where((row <= last)[:, None], rows[:, :actions], source.still)
    return jnp.concatenate([done, rows[:, actions:]], 1)


def _rows(episodes: Episodes) -> np.ndarray:
    return np.concatenate([episodes.actions, episodes.observations], 1)


def _place(counts: np.ndarray) -> np.ndarray:
    """Return 0 .. counts[0] - 1, 0 .. counts[1] - 1, .."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
