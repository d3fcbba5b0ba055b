"""Progress: a bar for each phase, and every report in metrics.jsonl."""

import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

from experiments.lab.folder import Folder
from gendiff import distributed


class Progress:
    """A bar for each phase, with rate and remaining time; metrics.jsonl has every report.

    A run can stop at a report after a notice of preemption, because all processes make the same reports.
    """

    bars = True
    """Draw bars, for all runs of this process."""

    def __init__(self, folder: Folder, prefix: str = "") -> None:
        self.folder, self.prefix, self.phase = folder, prefix, ""
        self.bar: tqdm | None = None

    def __call__(self, phase: str, done: int, of: int, metrics: Mapping[str, float]) -> None:
        distributed.stop_if_preempted("every checkpoint and every phase that was finished")
        distributed.first(lambda: self._show(phase, done, of, metrics))

    def alone(self, phase: str, of: int) -> Callable[[int], None]:
        """Reports of work that one process does while the others wait (`distributed.first`), without a collective."""

        def report(done: int) -> None:
            distributed.stop_if_noticed("every part that was finished")
            self._show(phase, min(done, of), of, {})

        return report

    def _show(self, phase: str, done: int, of: int, metrics: Mapping[str, float]) -> None:
        self.folder.append(time=round(time.time(), 1), phase=self.prefix + phase, done=done, of=of, **metrics)
        if phase != self.phase or self.bar is None:
            self.close()
            self.phase = phase
            self.bar = tqdm(
                total=of, initial=done, desc=self.prefix + phase, mininterval=0.5, dynamic_ncols=True,
                disable=not self.bars,
            )  # fmt: skip
        self.bar.update(min(done, of) - self.bar.n)
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in metrics.items()})
        if done >= of:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar, self.phase = None, ""
