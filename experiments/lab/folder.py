"""The folder of one run: its configuration, results, figures and log; a failed write keeps the old file."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.lab import lock, origin
from experiments.lab.config import Config, ConfigError, make_folder
from experiments.lab.table import Column, Results, Row, plain, table
from gendiff import distributed
from gendiff.checkpoint import Archive
from gendiff.data import files


class Folder:
    """The folder of one run, locked while it runs.

    Raises:
      ConfigError: the folder is of another configuration, or another process uses it.
    """

    def __init__(self, experiment: str, config: Config) -> None:
        self.experiment, self.config = experiment, config
        self.path = config.output or Path("results") / experiment / f"{config.preset}-{config.seed}"
        distributed.first(self._open)
        self.archive = Archive(self.path / "checkpoints")

    def _open(self) -> None:
        make_folder(self.path)
        self._is_ours()
        try:
            lock.take(self.path)
        except lock.Taken as holder:
            raise ConfigError(
                f"--output must be a folder that no other run uses, got {self.path}: wait for it, or name another "
                f"folder ({holder})"
            ) from None
        self._is_ours()  # again, because another run may have written before the lock
        text = json.dumps(_header(self.experiment) | fields(self.config), indent=2) + "\n"
        (self.path / "checkpoints").mkdir(exist_ok=True)
        for name in CONFIGS:
            if _stored(self.path / name) != json.loads(text):
                write(self.path / name, text)

    def _is_ours(self) -> None:
        own = (lock.NAME, "checkpoints") if not any(self.path.glob("checkpoints/*")) else (lock.NAME,)
        if not self.check(self.path, self.experiment, self.config) and any(
            path.name not in own and not path.name.endswith(".tmp") for path in self.path.iterdir()
        ):
            raise ConfigError(
                f"--output must be an empty folder or one of this experiment, got {self.path}, where neither "
                "config.json nor its copy in checkpoints can be read: name another folder, or empty this one"
            )

    @staticmethod
    def check(path: Path, experiment: str, config: Config) -> bool:
        """Return True if the folder holds a run of this experiment with this configuration, False if it holds none.

        The configuration is stored beside the checkpoints, in config.json, and in results.json.  The first readable
        copy counts, because a damaged config.json must not part a run from its checkpoints.

        Raises:
          ConfigError: it holds another configuration, or another format.
        """
        held = next((stored for name in CONFIGS if (stored := _stored(path / name)) is not None), None)
        if held is None and (results := _stored(path / "results.json")) and isinstance(results.get("config"), dict):
            held = {"experiment": results.get("experiment"), "format": results.get("format"), **results["config"]}
        if held is None:
            return False
        if held.get("format") != FORMAT:
            number = held.get("format") or 1
            raise ConfigError(
                f"--output: {path} must have format {FORMAT}, got {number}, which "
                f"{READERS.get(number, 'a later gendiff')} reads: name another folder, or use that version"
            )
        before, now = flat(held | {"output": None}), flat(_header(experiment) | fields(config))
        if names := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
            changes = "; ".join(f"{name} must be {before.get(name)}, got {now.get(name)}" for name in names)
            raise ConfigError(f"--output: {path} holds another configuration ({changes}): name another folder")
        return True

    def _check_there(self) -> None:
        """Raise OSError if the folder was removed or replaced since the run began."""
        if lock.lost(self.path) or not (self.path / "config.json").exists():
            raise OSError(
                f"{self.path} must stay as it is during the run, but it was removed or replaced: empty the folder and "
                "run the same command again"
            )

    def write(self, name: str, text: str) -> None:
        """Replace a file at once, so that a failure keeps the old one; only the first process writes."""

        def replace() -> None:
            self._check_there()
            write(self.path / name, text)

        distributed.first(replace)

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl; only the first process writes."""
        distributed.first(lambda: self.append(**values))

    def append(self, **values: Any) -> None:
        """`log` without the other processes."""
        self._check_there()
        lock.touch(self.path)
        path = self.path / "metrics.jsonl"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        with writing(path), os.fdopen(files.descriptor(path, flags), "ab+") as file:
            # Start a new line if a full disk cut off the last one.
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + json.dumps(_jsonable(values)).encode() + b"\n")

    def finish(self, rows: list[Row], columns: Sequence[Column], notes: str = "") -> Results:
        """Write results.json and table.md, unlock the folder, and return the results."""
        text = f"{table(rows, columns)}\n\n{notes}".strip()
        document = _header(self.experiment) | {
            "commit": origin.commit(),
            "device": origin.device(),
            "versions": origin.versions(),
            "processes": jax.process_count(),
            "config": dataclasses.asdict(self.config),
            "rows": [row._asdict() | {"metrics": plain(row.metrics)} for row in rows],
        }
        self.write("results.json", json.dumps(_jsonable(document), indent=2, allow_nan=False) + "\n")
        self.write("table.md", f"# {self.experiment}, preset {self.config.preset}\n\n{text}\n")
        distributed.first(self._check_there)
        lock.release(self.path)
        return Results(rows, self.path, text)


FORMAT = 2
"""The format of config.json, results.json and the names of phases."""
READERS = {1: "gendiff 0.1.0"}
"""Format -> the version that reads it."""
CONFIGS = ("checkpoints/config.json", "config.json")
"""Two copies of the configuration: a lost one is written again."""


def _stored(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if the file is missing or damaged."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return held if isinstance(held, dict) else None


def write(path: Path, text: str) -> None:
    """Replace a file at once, so that a failure keeps the old one."""
    with writing(path):
        files.store_text(path, text)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the file name to every OSError raised inside."""
    try:
        yield
    except OSError as error:
        kept = "; checkpoints are kept" if path.parent.exists() else ""
        raise OSError(f"{path}: could not be written ({error.strerror}){kept}") from None


def _header(experiment: str) -> dict[str, Any]:
    return {"experiment": experiment, "format": FORMAT}


def fields(config: Config) -> dict[str, Any]:
    """A configuration as JSON, without its folder."""
    return _jsonable(dataclasses.asdict(config) | {"output": None})


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict, with dotted names."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        result |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return result


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
