"""The file of labels: append-only JSON lines, one per mark, written by any number of concurrent pages.

    {"type": "mark", "sample": "0007.png", "hash": "9f86d0...", "label": "malign", "seconds": 1.32, "rater": "anna",
     "session": "k3jx", "time": "2026-01-31T09:15:02.120Z", "id": "k3jx-17"}
    {"type": "meaning", "text": "a seven with a stroke", "rater": "anna", "session": "k3jx", "time": "..."}
    {"type": "torn"}

- `label` is malign, undecided or benign; null takes the mark back.  The last line of a (hash, rater) counts.
- `hash` is `samples.content_hash`; `sample` is the sample's name at that time, for people.
- `seconds` is the active time since the page's previous mark.  A pause counts at most 30 s, a hidden page 0 s.
- `id` identifies the line, because a page without an answer sends it again; the first of equal ids counts.
- `group` (optional) is common to marks made by one key press; `undoes` (optional) is the id of the mark taken back.
- The last `meaning` defines malign.
- `torn` follows an unfinished line of a killed writer, and marks it as harmless.

The file must be regular, because a link could lead to another file, which errors would quote or marks would change.
"""

import datetime
import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from gendiff.feedback import regular
from gendiff.feedback.regular import shown

Label: TypeAlias = Literal["malign", "undecided", "benign"]
LABELS: tuple[Label, ...] = get_args(Label)
NAME, TEXT = 64, 4000
"""Largest numbers of characters: of rater, session and id; of meaning and sample name."""
_writing = threading.Lock()


class LabelError(ValueError):
    """A file of labels is missing, damaged, of other samples, or too short; it is unchanged."""


class Mark(NamedTuple):
    """A line with a rater's label of a sample."""

    sample: str
    hash: str
    label: Label | None
    """None takes back the rater's earlier label."""
    seconds: float
    rater: str
    session: str = ""
    time: str = ""
    """ISO 8601, UTC."""
    id: str = ""
    group: str = ""
    undoes: str = ""


class Meaning(NamedTuple):
    """A line that defines malign."""

    text: str
    rater: str
    session: str = ""
    time: str = ""


class Torn(NamedTuple):
    """A line after an unfinished line of a killed writer."""


Record: TypeAlias = Mark | Meaning | Torn


def now() -> str:
    """Return the time in the file's format."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def mark(sample: str, content: str, label: Label | None, rater: str, seconds: float = 0.0, session: str = "") -> Mark:
    """Make a mark without a page, such as for an oracle as a rater; `content` is the sample's hash."""
    return Mark(sample, content, label, seconds, rater, session, now(), uuid.uuid4().hex)


def append(path: Path, records: Sequence[Mark | Meaning], create: bool = True) -> None:
    """Append lines, and wait until they are on the disk; safe beside other writers and under a kill.

    Args:
      path: the file.
      records: lines to append.
      create: create the file if it is missing.

    Raises:
      ValueError: a record is invalid, such as a rater without a name; nothing is written.
      OSError: writing failed.  Earlier lines are unchanged, and the next `append` mends an unfinished line.
    """
    _append(path, records, os.O_CREAT if create else 0, lambda descriptor: True)


def restore(path: Path, records: Sequence[Mark | Meaning]) -> None:
    """Write a file of labels again that has vanished or was emptied, unless another program has filled it.

    Raises:
      OSError: writing failed.
    """
    _append(path, records, os.O_CREAT, lambda descriptor: not os.fstat(descriptor).st_size)


def _append(path: Path, records: Sequence[Mark | Meaning], create: int, wanted: Callable[[int], bool]) -> None:
    for record in records:
        parse(as_json(record))
    body = b"".join(_line(record) for record in records)
    try:
        with _writing, regular.locked(path, os.O_RDWR | os.O_APPEND | create, exclusive=True) as descriptor:
            if body and wanted(descriptor):
                regular.write(descriptor, _mend(descriptor) + body)
    except OSError as error:
        raise OSError(
            f"labels {shown(path)}: could not be written ({error.strerror}); stored labels are unchanged"
        ) from error


def read(*paths: Path) -> list[Mark]:
    """Read all marks of files of the same samples, in order, without repeated lines."""
    return [record for record in records(*paths) if isinstance(record, Mark)]


def meaning(*paths: Path) -> str:
    """Read the last definition of malign; "" without one."""
    return next((record.text for record in reversed(records(*paths)) if isinstance(record, Meaning)), "")


def records(*paths: Path) -> list[Record]:
    """Read all lines.

    Raises:
      LabelError: the file is missing, or holds a bad line that is neither the last nor followed by "torn".
    """
    seen: set[str] = set()
    return [record for path in paths for record in _first(Follower(path).read(), seen)]


def latest(marks: Iterable[Mark]) -> dict[tuple[str, str], Mark]:
    """Return the last mark of every (hash, rater), without marks that were taken back."""
    last = {(mark.hash, mark.rater): mark for mark in marks}
    return {key: mark for key, mark in last.items() if mark.label is not None}


def seconds(marks: Iterable[Mark]) -> dict[str, float]:
    """Return the raters' active labelling time in seconds, until the last mark of a page."""
    total: dict[str, float] = {}
    for mark in marks:
        total[mark.rater] = total.get(mark.rater, 0.0) + mark.seconds
    return total


def parse(record: Any) -> Record:
    """Convert a line's JSON object to a record.

    Raises:
      ValueError: a field is wrong; the message names it.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a line must be an object, got {type(record).__name__}")
    kind = record.get("type")
    if kind == "torn":
        return Torn()
    stamp = {name: _text(record, name, NAME, "") for name in ("session", "time")}
    if kind == "meaning":
        return Meaning(_text(record, "text", TEXT), _rater(record), **stamp)
    if kind != "mark":
        raise ValueError(f"type must be mark, meaning or torn, got {kind!r}")
    label, content = record.get("label", ""), _text(record, "hash", NAME)
    if label is not None and label not in LABELS:
        raise ValueError(f"label must be {', '.join(LABELS)} or null, got {label!r}")
    if not re.fullmatch("[0-9a-f]{64}", content):
        raise ValueError(f"hash must be 64 hexadecimal digits, got {content!r}")
    rest = {name: _text(record, name, NAME, "") for name in ("id", "group", "undoes")}
    return Mark(_text(record, "sample", TEXT), content, label, _seconds(record), _rater(record), **stamp, **rest)


def as_json(record: Record) -> dict[str, Any]:
    """Convert a record to a JSON object for `parse`, without empty fields."""
    fields = {name: value for name, value in record._asdict().items() if value != "" or name == "text"}
    return {"type": type(record).__name__.lower(), **fields}


def _text(record: Mapping[str, Any], name: str, longest: int, default: str | None = None) -> str:
    value = record.get(name, default)
    if not isinstance(value, str) or len(value) > longest or not _unicode(value):
        raise ValueError(f"{name} must be Unicode text of at most {longest} characters, got {str(value)[:80]!r}")
    return value


def _unicode(text: str) -> bool:
    """Return False for half a surrogate pair, because an answer to the page cannot hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rater(record: Mapping[str, Any]) -> str:
    rater = _text(record, "rater", NAME)
    if not rater.strip() or not rater.isprintable():
        raise ValueError(f"rater must be a name of printable characters, got {rater!r}")
    return rater


def _seconds(record: Mapping[str, Any]) -> float:
    value = record.get("seconds")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError(f"seconds must be a number >= 0, got {value!r}")
    return float(value)


def _line(record: Record) -> bytes:
    return json.dumps(as_json(record), allow_nan=False).encode() + b"\n"


def _mend(descriptor: int) -> bytes:
    """Return the bytes to write before the next line: nothing, or the end of an unfinished line."""
    tail = _tail(descriptor)
    if not tail:
        return b""
    return b"\n" if _complete(tail) else b"\n" + _line(Torn())


def _tail(descriptor: int) -> bytes:
    """Return the bytes after the last newline."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    start = max(0, end - 65536)  # longer than any line
    os.lseek(descriptor, start, os.SEEK_SET)
    return os.read(descriptor, end - start).rpartition(b"\n")[2]


def _complete(line: bytes) -> bool:
    try:
        parse(json.loads(line))
    except (ValueError, OverflowError, RecursionError):
        return False
    return True


def _first(records: Iterable[Record], seen: set[str]) -> Iterator[Record]:
    """Yield the records without marks whose id is in `seen`; add the yielded ids to `seen`."""
    for record in records:
        if isinstance(record, Mark) and record.id:
            if record.id in seen:
                continue
            seen.add(record.id)
        yield record


class Follower:
    """An incremental reader of a growing file of labels: it parses only new lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget()

    def _forget(self) -> None:
        self._state: tuple[int, ...] = ()
        self._end, self._last, self._lines = 0, b"", 0
        self._records: list[Record] = []
        self._seen: set[str] = set()
        self._open: list[Record] = []

    def changed(self) -> bool:
        """Return True if the file was changed or replaced since the last `read`.

        Raises:
          FileNotFoundError: the file has vanished.
        """
        return _state(os.lstat(self.path)) != self._state

    def read(self) -> list[Record]:
        """Read all lines, without repeated marks.

        Raises:
          LabelError: the file is missing, or holds a bad line that is neither the last nor followed by "torn".
        """
        try:
            with regular.locked(self.path, os.O_RDONLY, exclusive=False) as descriptor:
                state = _state(os.fstat(descriptor))
                if not self._grown(descriptor, state):
                    self._forget()
                fresh = regular.content(descriptor, self._end)
        except FileNotFoundError:
            raise LabelError(f"labels {shown(self.path)} must be a file of labels, got none") from None
        except OSError as error:
            raise LabelError(
                f"labels {shown(self.path)} must be a file of labels, got none to read ({error.strerror})"
            ) from error
        self._take(fresh)
        self._state = state
        return [*self._records, *self._open]

    def _grown(self, descriptor: int, state: tuple[int, ...]) -> bool:
        """Return True if the file still begins with the lines already read, judging by the last of them."""
        same_file, longer = state[:2] == self._state[:2], state[2] > self._end
        return (
            same_file
            and longer
            and regular.content(descriptor, self._end - len(self._last), len(self._last)) == self._last
        )

    def _take(self, fresh: bytes) -> None:
        *lines, rest = fresh.split(b"\n")
        found = list(_parsed(self.path, [*lines, b""], self._lines + 1))
        self._records = [*self._records, *_first(found, self._seen)]
        # Parse the bytes after the last newline again next time, because the line may be unfinished.
        self._open = list(_first(_parsed(self.path, [rest], 0), set(self._seen) if rest else set()))
        if lines:
            self._last = lines[-1] + b"\n"
        self._end, self._lines = self._end + len(fresh) - len(rest), self._lines + len(lines)


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _parsed(path: Path, lines: Sequence[bytes], start: int) -> Iterator[Record]:
    """Parse lines, numbered from `start`; the last one holds the bytes after the last newline, mostly none."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield parse(json.loads(line))
        except (ValueError, OverflowError, RecursionError) as error:
            unfinished = number == len(lines) or lines[number].strip() == _line(Torn()).strip()
            if not unfinished:  # the error does not quote the line, because the file may be a private one
                raise LabelError(
                    f"labels {shown(path)}, line {start + number - 1} must be a JSON line of a mark or a meaning, "
                    f"got {len(line)} bytes of another kind ({_reason(error)}): mend or delete this line; no other "
                    "line is lost"
                ) from None


def _reason(error: Exception) -> str:
    return "bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
