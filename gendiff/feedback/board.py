"""State of a labelling page: samples, their file of labels, and the numbers of labels needed."""

import dataclasses
import hashlib
import logging
import threading
from pathlib import Path
from typing import Any, NamedTuple

from gendiff.feedback import consensus, labels, render
from gendiff.feedback.labels import Follower, Mark, Meaning, Record
from gendiff.feedback.regular import shown
from gendiff.feedback.samples import Samples


class State(NamedTuple):
    """Content of a file of labels."""

    marks: list[Mark]
    meaning: str
    enough: bool


LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Board:
    """Samples and their labels, for any number of concurrent pages and threads."""

    samples: Samples
    path: Path
    """The file of labels; created if it is missing."""
    rater: str
    """Default name of the rater; the page can change it."""
    columns: int = 8
    need: tuple[int, int] | None = None
    """Numbers of malign and benign samples needed."""
    up: render.Up = "y"
    finished: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Set when the rater ends the page."""

    def __post_init__(self) -> None:
        labels.append(self.path, [])
        self._lock, self._file, self._notice = threading.Lock(), Follower(self.path), ""
        self._records: list[Record] = []
        self._state = State([], "", False)
        self.refresh()

    def refresh(self) -> State:
        """Read new lines of the file, and return its content.

        If the file has vanished or was emptied, write it again from memory, so that no mark is lost.

        Raises:
          LabelError: the file is damaged, or holds labels of other samples.
          OSError: the file has vanished and cannot be written again.
        """
        with self._lock:
            if self._file_changed():
                records = self._file.read()
                marks = [record for record in records if isinstance(record, Mark)]
                meaning = next((record.text for record in reversed(records) if isinstance(record, Meaning)), "")
                old = self._state.marks
                grown = not old or (len(marks) >= len(old) and marks[len(old) - 1] is old[-1])
                consensus.check(self.samples, marks[len(old) :] if grown else marks)
                if len(marks) < len(old):  # warn, because another program has removed marks
                    self._tell(f"{shown(self.path)} was replaced: {len(old) - len(marks)} of its marks are gone")
                self._records, self._state = records, State(marks, meaning, self._suffices(marks))
            return self._state

    def _file_changed(self) -> bool:
        try:
            changed, size = self._file.changed(), self.path.lstat().st_size
        except FileNotFoundError:
            changed, size = True, 0
        if not size and (kept := [record for record in self._records if isinstance(record, Mark | Meaning)]):
            labels.restore(self.path, kept)
            self._tell(f"{shown(self.path)} had vanished or was emptied: its {len(kept)} lines were written again")
        return changed

    def _tell(self, text: str) -> None:
        LOG.warning("%s", text)
        self._notice = f"{text} at {labels.now()}"

    def _suffices(self, marks: list[Mark]) -> bool:
        if self.need is None:
            return False
        merged, (malign, benign) = consensus.aligned(self.samples, marks), self.need
        return merged.count("malign") >= malign and merged.count("benign") >= benign

    def news(self, rater: str, since: int) -> dict[str, Any]:
        """Return the rater's marks from number `since` on, and the state, as JSON for the page."""
        state = self.refresh()
        fresh = [mark._asdict() for mark in state.marks[since:] if mark.rater == rater]
        return {
            "marks": fresh,
            "next": len(state.marks),
            "meaning": state.meaning,
            "enough": state.enough,
            "notice": self._notice,
        }

    def about(self, rater: str) -> dict[str, Any]:
        """Return all that the page shows, as JSON."""
        return {
            "set": hashlib.sha256("".join(self.samples.hashes).encode()).hexdigest()[:16],
            "place": shown(self.samples.place),
            "labels": shown(self.path),
            "kind": self.samples.kind,
            "samples": list(zip(self.samples.ids, self.samples.hashes, strict=True)),
            "rater": rater,
            "columns": self.columns,
            "need": self.need,
            **self.news(rater, 0),
        }

    def add(self, lines: Any) -> None:
        """Append the lines that a page sends; a bad line raises ValueError, and none is stored."""
        if not isinstance(lines, list):
            raise ValueError(f"lines must be a list, got {type(lines).__name__}")
        records = [record for record in map(labels.parse, lines) if isinstance(record, Mark | Meaning)]
        consensus.check(self.samples, [record for record in records if isinstance(record, Mark)])
        self.refresh()  # first, because it restores a file that has vanished
        labels.append(self.path, records, create=False)
