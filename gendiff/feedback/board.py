"""What a labelling page is about: samples, the file of their labels, and how many are wanted."""

import dataclasses
import hashlib
import threading
from pathlib import Path
from typing import Any, NamedTuple

from gendiff.feedback import consensus, labels, render
from gendiff.feedback.labels import Mark, Meaning
from gendiff.feedback.samples import Samples


class State(NamedTuple):
    """What a file of labels says."""

    marks: list[Mark]
    meaning: str
    enough: bool


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
        self._lock, self._size = threading.Lock(), -1
        self._state = State([], "", False)
        self.refresh()

    def refresh(self) -> State:
        """What the file says now; it is read again where it has grown."""
        with self._lock:
            size = self.path.stat().st_size
            if size != self._size:
                found = labels.records(self.path)
                marks = [record for record in found if isinstance(record, Mark)]
                meaning = next((each.text for each in reversed(found) if isinstance(each, Meaning)), "")
                self._state, self._size = State(marks, meaning, self._suffices(marks)), size
            return self._state

    def _suffices(self, marks: list[Mark]) -> bool:
        merged = consensus.aligned(self.samples, marks)
        if self.need is None:
            return False
        malign, benign = self.need
        return merged.count("malign") >= malign and merged.count("benign") >= benign

    def news(self, rater: str, since: int) -> dict[str, Any]:
        """The rater's marks from the one numbered `since` on, as the page reads them."""
        state = self.refresh()
        fresh = [mark._asdict() for mark in state.marks[since:] if mark.rater == rater]
        return {"marks": fresh, "next": len(state.marks), "meaning": state.meaning, "enough": state.enough}

    def about(self, rater: str) -> dict[str, Any]:
        """All that the page shows."""
        return {
            "set": hashlib.sha256("".join(self.samples.hashes).encode()).hexdigest()[:16],
            "place": str(self.samples.place),
            "labels": str(self.path),
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
            raise ValueError(f"lines: expected a list, given {type(lines).__name__}")
        records = [record for record in map(labels.parse, lines) if isinstance(record, Mark | Meaning)]
        consensus.check(self.samples, [record for record in records if isinstance(record, Mark)])
        labels.append(self.path, records)
