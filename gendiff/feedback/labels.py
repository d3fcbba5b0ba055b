"""The file of labels: plain JSON lines that are only ever appended to, one line a mark, by any number of pages at once.

    {"type": "mark", "sample": "0007.png", "hash": "9f86d0...", "label": "malign", "seconds": 1.32, "rater": "anna",
     "session": "k3jx", "time": "2026-01-31T09:15:02.120Z", "id": "k3jx-17"}
    {"type": "meaning", "text": "a seven with a stroke", "rater": "anna", "session": "k3jx", "time": "..."}
    {"type": "torn"}

- `label` is malign, undecided or benign; null takes the mark back.  The last line of a (hash, rater) counts.
- `hash` is `samples.content_hash`; `sample` is the name it had, for people.
- `seconds` is the active time since the previous mark of the same page: at most 30 s between two signs of life, nothing
  while the page is hidden.
- `id` names the line: a page that did not hear an answer sends it again, and the first of equal ids counts.
- optional: `group`, the same for marks made by one key; `undoes`, the id of the mark that this one takes back.
- the last `meaning` says what malign means.
- `torn` follows a line that a killed writer left unfinished, and says that it is no damage.

The file must be a regular one: a link could lead to another file, which would be quoted, or written to.
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
"""Longest rater, session and id; longest meaning and sample name."""
_writing = threading.Lock()


class LabelError(ValueError):
    """A file of labels that is missing, damaged, of other samples, or too short; it is left as it is."""


class Mark(NamedTuple):
    """One line: what a rater said of a sample."""

    sample: str
    hash: str
    label: Label | None
    """None takes back what the rater said before."""
    seconds: float
    rater: str
    session: str = ""
    time: str = ""
    """ISO 8601, UTC."""
    id: str = ""
    group: str = ""
    undoes: str = ""


class Meaning(NamedTuple):
    """What "malign" means, from here on."""

    text: str
    rater: str
    session: str = ""
    time: str = ""


class Torn(NamedTuple):
    """The line before was left unfinished by a killed writer."""


Record: TypeAlias = Mark | Meaning | Torn


def now() -> str:
    """The time as it stands in the file."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def mark(sample: str, content: str, label: Label | None, rater: str, seconds: float = 0.0, session: str = "") -> Mark:
    """A new mark, for raters without a page (an oracle that plays one); `content` is the sample's hash."""
    return Mark(sample, content, label, seconds, rater, session, now(), uuid.uuid4().hex)


def append(path: Path, records: Sequence[Mark | Meaning], create: bool = True) -> None:
    """Adds lines at the end and returns when they are on the disk; safe beside other writers and under a kill.

    Args:
      path: the file.
      records: what to add.
      create: make the file if it is missing.

    Raises:
      ValueError: `read` would not read a record, such as a rater without a name; nothing is written.
      OSError: names the file; what was there is untouched, and an unfinished line is mended by the next `append`.
    """
    _append(path, records, os.O_CREAT if create else 0, lambda descriptor: True)


def restore(path: Path, records: Sequence[Mark | Meaning]) -> None:
    """Writes a file of labels that has vanished or was emptied, unless another program has filled it already.

    Raises:
      OSError: names the file.
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
            f"labels {shown(path)}: could not be written ({error.strerror}); what was stored is untouched"
        ) from error


def read(*paths: Path) -> list[Mark]:
    """All marks in the order of the file, or of several files of the same samples; repeated lines once."""
    return [record for record in records(*paths) if isinstance(record, Mark)]


def meaning(*paths: Path) -> str:
    """What "malign" means by the last line that says so; "" if none does."""
    return next((record.text for record in reversed(records(*paths)) if isinstance(record, Meaning)), "")


def records(*paths: Path) -> list[Record]:
    """All lines.

    Raises:
      LabelError: the file is missing, or a line that is neither the last nor followed by "torn" cannot be read.
    """
    seen: set[str] = set()
    return [record for path in paths for record in _first(Follower(path).read(), seen)]


def latest(marks: Iterable[Mark]) -> dict[tuple[str, str], Mark]:
    """The mark that counts of each (hash, rater); none where it was taken back."""
    last = {(mark.hash, mark.rater): mark for mark in marks}
    return {key: mark for key, mark in last.items() if mark.label is not None}


def seconds(marks: Iterable[Mark]) -> dict[str, float]:
    """Active labelling time of each rater.  What follows the last mark of a page is not in it."""
    total: dict[str, float] = {}
    for each in marks:
        total[each.rater] = total.get(each.rater, 0.0) + each.seconds
    return total


def parse(record: Any) -> Record:
    """A line's JSON object as a record; ValueError says which field is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, given {type(record).__name__}")
    kind = record.get("type")
    if kind == "torn":
        return Torn()
    stamp = {name: _text(record, name, NAME, "") for name in ("session", "time")}
    if kind == "meaning":
        return Meaning(_text(record, "text", TEXT), _rater(record), **stamp)
    if kind != "mark":
        raise ValueError(f"type: expected mark, meaning or torn, given {kind!r}")
    label, content = record.get("label", ""), _text(record, "hash", NAME)
    if label is not None and label not in LABELS:
        raise ValueError(f"label: expected {', '.join(LABELS)} or null, given {label!r}")
    if not re.fullmatch("[0-9a-f]{64}", content):
        raise ValueError(f"hash: expected 64 hexadecimal digits, given {content!r}")
    rest = {name: _text(record, name, NAME, "") for name in ("id", "group", "undoes")}
    return Mark(_text(record, "sample", TEXT), content, label, _seconds(record), _rater(record), **stamp, **rest)


def as_json(record: Record) -> dict[str, Any]:
    """What `parse` reads: the record's fields, without those that say nothing."""
    fields = {name: value for name, value in record._asdict().items() if value != "" or name == "text"}
    return {"type": type(record).__name__.lower(), **fields}


def _text(record: Mapping[str, Any], name: str, longest: int, default: str | None = None) -> str:
    value = record.get(name, default)
    if not isinstance(value, str) or len(value) > longest or not _unicode(value):
        raise ValueError(f"{name} must be Unicode text of at most {longest} characters, got {str(value)[:80]!r}")
    return value


def _unicode(text: str) -> bool:
    """False for half a surrogate pair, which no answer to the page can hold."""
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
        raise ValueError(f"seconds: expected a number >= 0, given {value!r}")
    return float(value)


def _line(record: Record) -> bytes:
    return json.dumps(as_json(record), allow_nan=False).encode() + b"\n"


def _mend(descriptor: int) -> bytes:
    """What must come before the next line: nothing, or the end of one that a killed writer left unfinished."""
    tail = _tail(descriptor)
    if not tail:
        return b""
    return b"\n" if _complete(tail) else b"\n" + _line(Torn())


def _tail(descriptor: int) -> bytes:
    """The bytes behind the last newline."""
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
    """The records without marks whose id is in `seen`, which gets the ids of the others."""
    for record in records:
        if isinstance(record, Mark) and record.id:
            if record.id in seen:
                continue
            seen.add(record.id)
        yield record


class Follower:
    """A file of labels that grows: each look at it reads and parses the new lines only."""

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
        """Whether the file is another, or has changed, since the last `read`; FileNotFoundError if it is gone."""
        return _state(os.lstat(self.path)) != self._state

    def read(self) -> list[Record]:
        """All lines, repeated marks once.

        Raises:
          LabelError: the file is missing, or a line that is neither the last nor followed by "torn" cannot be read.
        """
        try:
            with regular.locked(self.path, os.O_RDONLY, exclusive=False) as descriptor:
                state = _state(os.fstat(descriptor))
                if not self._grown(descriptor, state):
                    self._forget()
                fresh = regular.content(descriptor, self._end)
        except FileNotFoundError:
            raise LabelError(f"labels {shown(self.path)}: expected a file of labels, given none") from None
        except OSError as error:
            raise LabelError(
                f"labels {shown(self.path)}: expected a file of labels, given none to read ({error.strerror})"
            ) from error
        self._take(fresh)
        self._state = state
        return [*self._records, *self._open]

    def _grown(self, descriptor: int, state: tuple[int, ...]) -> bool:
        """Whether the lines that were read are the file's beginning still, as far as the last line tells."""
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
        # What follows the last newline may be a line without its end: it is looked at again the next time.
        self._open = list(_first(_parsed(self.path, [rest], 0), set(self._seen) if rest else set()))
        if lines:
            self._last = lines[-1] + b"\n"
        self._end, self._lines = self._end + len(fresh) - len(rest), self._lines + len(lines)


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _parsed(path: Path, lines: Sequence[bytes], start: int) -> Iterator[Record]:
    """Lines from number `start` on, split at newlines; the last is what follows the last newline, mostly nothing."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield parse(json.loads(line))
        except (ValueError, OverflowError, RecursionError) as error:
            unfinished = number == len(lines) or lines[number].strip() == _line(Torn()).strip()
            if not unfinished:  # the line is not quoted: the file may be another that was never meant to be read
                raise LabelError(
                    f"labels {shown(path)}, line {start + number - 1}: expected a JSON line of a mark or a meaning, "
                    f"given {len(line)} bytes of another kind ({_reason(error)}). Mend or delete this line; nothing "
                    "else is lost"
                ) from None


def _reason(error: Exception) -> str:
    return "bytes that are not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
