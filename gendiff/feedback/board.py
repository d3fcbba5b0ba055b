"""What a labelling page is about: samples, the file of their labels, and how many are wanted."""

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
    """What a file of labels says."""

    marks: list[Mark]
    meaning: str
    enough: bool


LOG = logging.getLogger(__name__)


@dataclasses.dataclass
class Board:
    """Samples and their labels, for any number of pages and threads at once."""

    samples: Samples
    path: Path
    """The file of labels; made if it is missing."""
    rater: str
    """Who marks, unless the page is told another name."""
    columns: int = 8
    need: tuple[int, int] | None = None
    """Malign and benign samples that are wanted."""
    up: render.Up = "y"
    finished: threading.Event = dataclasses.field(default_factory=threading.Event)
    """The rater has said that it is enough."""

    def __post_init__(self) -> None:
        labels.append(self.path, [])
        self._lock, self._file, self._notice = threading.Lock(), Follower(self.path), ""
        self._records: list[Record] = []
        self._state = State([], "", False)
        self.refresh()

    def refresh(self) -> State:
        """What the file says now; lines that are new are read.

        A file that has vanished or was emptied is written again from memory: marks are never lost.

        Raises:
          LabelError: the file is damaged, or holds labels of other samples.
          OSError: the file has vanished and cannot be written again.
        """
        with self._lock:
            if self._file_changed():
                records = self._file.read()
                marks = [record for record in records if isinstance(record, Mark)]
                meaning = next((each.text for each in reversed(records) if isinstance(each, Meaning)), "")
                old = self._state.marks
                grown = not old or (len(marks) >= len(old) and marks[len(old) - 1] is old[-1])
                consensus.check(self.samples, marks[len(old) :] if grown else marks)
                if len(marks) < len(old):  # another program may do that, but nobody should lose marks unknowingly
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
        """The rater's marks from the one numbered `since` on, as the page reads them."""
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
        """All that the page shows."""
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
        """Appends what a page sends: all of it, or with a ValueError nothing."""
        if not isinstance(lines, list):
            raise ValueError(f"lines must be a list, got {type(lines).__name__}")
        records = [record for record in map(labels.parse, lines) if isinstance(record, Mark | Meaning)]
        consensus.check(self.samples, [record for record in records if isinstance(record, Mark)])
        self.refresh()  # a file that has vanished is written again before lines are added to it
        labels.append(self.path, records, create=False)
