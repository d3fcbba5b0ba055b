"""Kill runs at random moments, restart them until they finish, and compare their results with an undisturbed run's.

    python -m tests.kills --kills 100 --seed 0 --work FOLDER

Smoke presets run as commands in their own process groups.  A group gets SIGKILL, or sometimes SIGTERM or SIGINT, at a
moment drawn evenly over the time of an undisturbed run.  Every number of `results.json` that no clock measures must be
equal in all bits.  FOLDER has the record, so that the same command goes on after a stop.  This script uses only
commands, files and exit statuses of the project.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
SHARES = {"genneg.checkerboard": 40, "genneg.traffic": 20, "censoring.mnist": 20, "relative_reward.maze2d": 20}
"""Experiments and their parts of the kills, by default."""
SIGNALS = {signal.SIGKILL: 0.6, signal.SIGTERM: 0.2, signal.SIGINT: 0.2}
"""Shares of the signals."""
STATUSES = {
    signal.SIGKILL: {-signal.SIGKILL},
    # A signal ends the process by default until Python runs our first line.
    signal.SIGTERM: {75, -signal.SIGTERM},
    signal.SIGINT: {130, -signal.SIGINT},
}
"""Exit statuses after a signal; also 0, if the run finished first."""
IN_A_ROW = 8
"""Most kills of a run, which then runs to its end, so that its results can be compared."""
CLOCK = "seconds"
"""Part of the name of a metric that a clock measures."""
GRACE = 300.0
"""Longest time of a stop after SIGTERM or SIGINT, and of a start, in seconds."""


class Kill(NamedTuple):
    """A kill, and how the process ended."""

    experiment: str
    run: int
    """Number of the run, which is killed until it finishes."""
    number: int
    """Of the signal."""
    after: float
    """Seconds after the start of the process."""
    status: int
    stopping: float
    """Seconds from the signal to the end."""
    left: int
    """Processes that are alive a few seconds later."""
    last: str
    """Last line that the process wrote to standard error, where its status was not expected."""


class Done(NamedTuple):
    """A run that was killed and came to its end, or could not."""

    experiment: str
    run: int
    kills: int
    lost: str
    """Why it could not go on; empty where it did."""
    different: list[str]
    """Names of the numbers that differ from the undisturbed run's."""


# Processes.


def start(experiment: str, folder: Path, log: Path) -> subprocess.Popen:
    """Start a smoke preset in a process group of its own."""
    command = [sys.executable, "-m", f"experiments.{experiment}", "--preset", "smoke", "--output", str(folder)]
    with log.open("wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )


def members(group: int) -> list[int]:
    """The living processes of a session (zombies are dead)."""
    listed = subprocess.run(["ps", "-A", "-o", "pid=,sess=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(row[0]) for row in rows if row[1] == str(group) and not row[2].startswith("Z")]


def left_over(group: int, seconds: float = 5.0) -> int:
    """How many processes of a session live on for so long; they are ended then."""
    end = time.monotonic() + seconds
    while (living := members(group)) and time.monotonic() < end:
        time.sleep(0.2)
    for process in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return len(living)


def ended(process: subprocess.Popen, seconds: float) -> int | None:
    """The exit status, or None where the process does not end in time."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def last_line(log: Path) -> str:
    lines = log.read_bytes().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1][:300] if lines else ""


# Results.


def figures(folder: Path) -> dict[str, Any]:
    """Row and metric -> estimate, without metrics of a clock."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {
        f"{row['name']}/{name}": estimate
        for row in rows
        for name, estimate in row["metrics"].items()
        if CLOCK not in name
    }


def differences(reference: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of the numbers that differ in any bit."""
    return sorted(name for name in {*reference, *found} if reference.get(name) != found.get(name))


# The work.


class Work:
    """The folder of a series of kills, with their record, `kills.jsonl`."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.file = folder / "kills.jsonl"
        self.kills: list[Kill] = []
        self.done: list[Done] = []
        self.seconds: dict[str, float] = {}
        """Duration of an undisturbed run, by experiment."""
        folder.mkdir(parents=True, exist_ok=True)
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            try:
                self._take(json.loads(line))
            except ValueError:
                continue  # cut off by a kill of this script

    def _take(self, note: dict[str, Any]) -> None:
        kind = note.pop("kind")
        if kind == "whole":
            self.seconds[note["experiment"]] = note["seconds"]
        elif kind == "kill":
            self.kills.append(Kill(**note))
        else:
            self.done.append(Done(**note))

    def note(self, kind: str, **values: Any) -> None:
        """Append a line to the record."""
        with self.file.open("a") as file:  # begins a line, because a kill may have cut the last one off
            file.write(("\n" if file.tell() else "") + json.dumps({"kind": kind, **values}))
        self._take({"kind": kind, **values})

    def of(self, experiment: str, run: int | None = None) -> list[Kill]:
        """The kills of an experiment, or of one of its runs."""
        return [kill for kill in self.kills if kill.experiment == experiment and run in (None, kill.run)]

    def place(self, experiment: str, name: str) -> Path:
        return self.folder / experiment / name

    def reference(self, experiment: str) -> dict[str, Any]:
        """The numbers of an undisturbed run."""
        folder = self.place(experiment, "whole")
        folder.parent.mkdir(parents=True, exist_ok=True)
        if experiment not in self.seconds:
            shutil.rmtree(folder, ignore_errors=True)
            log = self.place(experiment, "whole.log")
            print(f"{experiment}: an undisturbed run", flush=True)
            for _ in range(2):  # time the second run, because the first one compiles and takes longer
                shutil.rmtree(folder, ignore_errors=True)
                began = time.monotonic()
                status = start(experiment, folder, log).wait()
                if status:
                    raise SystemExit(f"error: {experiment}: ended with status {status}: {last_line(log)}")
            self.note("whole", experiment=experiment, seconds=time.monotonic() - began)
        return figures(folder)

    def chance(self, experiment: str, run: int, kill: int) -> random.Random:
        """The random numbers of a kill, equal in every run of this script."""
        name = f"{self.seed} {experiment} {run} {kill}"
        return random.Random(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))

    def kill(self, experiment: str, run: int) -> Kill | None:
        """Kill a run once; None if it finished first."""
        folder, log = self.place(experiment, f"run-{run}"), self.place(experiment, f"run-{run}.log")
        chance = self.chance(experiment, run, len(self.of(experiment, run)))
        (number,) = chance.choices(list(SIGNALS), list(SIGNALS.values()))
        after = chance.uniform(0, self.seconds[experiment])
        process = start(experiment, folder, log)
        status = ended(process, after)
        if status is not None:
            return None if status == 0 else self._killed(experiment, run, number, after, status, 0.0, process.pid, log)
        sent = time.monotonic()
        os.killpg(process.pid, number)
        status = ended(process, GRACE)
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = -999
        return self._killed(experiment, run, number, after, status, time.monotonic() - sent, process.pid, log)

    def _killed(
        self, experiment: str, run: int, number: int, after: float, status: int, stopping: float, group: int, log: Path
    ) -> Kill:
        good = status in STATUSES[signal.Signals(number)] | {0}
        last = "" if good else "did not stop" if status == -999 else last_line(log)
        kill = Kill(experiment, run, int(number), after, status, stopping, left_over(group), last)
        self.note("kill", **kill._asdict())
        return kill

    def finish(self, experiment: str, run: int, reference: dict[str, Any]) -> Done:
        """Let a run finish, and compare its numbers."""
        folder, log = self.place(experiment, f"run-{run}"), self.place(experiment, f"run-{run}.log")
        kills = self.of(experiment, run)
        lost = next((f"status {kill.status}: {kill.last}" for kill in kills if kill.last), "")
        status = start(experiment, folder, log).wait()
        if status:
            lost = lost or f"status {status}: {last_line(log)}"
        try:
            different = [] if status else differences(reference, figures(folder))
        except (OSError, ValueError) as error:
            lost, different = lost or f"no results: {error}", []
        done = Done(experiment, run, len(kills), lost, different)
        self.note("done", **done._asdict())
        if not lost and not different:
            shutil.rmtree(folder, ignore_errors=True)
        return done


def series(work: Work, shares: dict[str, int]) -> None:
    """Carry out the remaining kills, with progress."""
    at_first, total = len(work.kills), sum(shares.values())

    def report() -> None:
        count, took = len(work.kills), time.monotonic() - began
        rate = (count - at_first) / took
        remaining = f"{(total - count) / rate / 60:.0f} min to go" if rate else "?"
        bad = sum(bool(done.lost) for done in work.done), sum(bool(done.different) for done in work.done)
        print(
            f"{count} of {total} kills, {len(work.done)} runs finished, {bad[0]} lost, {bad[1]} different, "
            f"{60 * rate:.2f} kills a minute, {remaining}",
            flush=True,
        )

    references = {experiment: work.reference(experiment) for experiment in shares}
    began = time.monotonic()
    for experiment, share in shares.items():
        reference = references[experiment]
        own = partial(work.of, experiment)
        run = 0
        while True:
            finished = {done.run for done in work.done if done.experiment == experiment}
            unfinished = [kill.run for kill in own() if kill.run not in finished]
            if len(own()) >= share and not unfinished:
                break
            while run in finished:
                run += 1
            if not own(run):
                shutil.rmtree(work.place(experiment, f"run-{run}"), ignore_errors=True)
            killed = True
            while killed and len(own()) < share and len(own(run)) < IN_A_ROW:
                killed = work.kill(experiment, run) is not None
                report()
            work.finish(experiment, run, reference)
            report()


def table(work: Work, shares: dict[str, int]) -> str:
    """The kills and their outcomes, by experiment."""
    head = ("experiment", "kills", "runs", "lost", "different", "left over", "statuses")
    rows = [head]
    for experiment in shares:
        kills = work.of(experiment)
        done = [run for run in work.done if run.experiment == experiment]
        statuses = collections.Counter((signal.Signals(kill.number).name, kill.status) for kill in kills)
        rows.append((
            experiment, str(len(kills)), str(len(done)), str(sum(bool(run.lost) for run in done)),
            str(sum(bool(run.different) for run in done)), str(sum(run.left for run in kills)),
            ", ".join(f"{name} {status}: {count}" for (name, status), count in sorted(statuses.items())),
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    stopping = [kill.stopping for kill in work.kills if kill.number != signal.SIGKILL and kill.status != 0]
    if stopping:
        lines.append(f"From SIGTERM or SIGINT to the end: {max(stopping):.1f} s at most.")
    for run in work.done:
        if run.lost:
            lines.append(f"lost: {run.experiment}, run {run.run}: {run.lost}")
        if run.different:
            lines.append(f"different: {run.experiment}, run {run.run}: {', '.join(run.different[:5])}")
    return "\n".join(lines)


def split(total: int, shares: dict[str, int]) -> dict[str, int]:
    """Split kills over experiments by their shares; the first ones get the remainder."""
    parts = sum(shares.values())
    kills = {name: total * share // parts for name, share in shares.items()}
    for name in list(kills)[: total - sum(kills.values())]:
        kills[name] += 1
    return {name: count for name, count in kills.items() if count}


def main() -> None:
    """The command line: status 0 if no run is lost or different and no process is left over; else 1."""
    parser = argparse.ArgumentParser("python -m tests.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs and of their record")
    usual = " ".join(f"{name}={share}" for name, share in SHARES.items())
    parser.add_argument("--experiments", nargs="+", metavar="NAME=SHARE", help=f"default: {usual}")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # because a script's `&` switches it off for children
    try:
        pairs = [text.partition("=") for text in options.experiments or []]
        shares = {name: int(share or 1) for name, _, share in pairs} or SHARES
    except ValueError:
        parser.error(f"--experiments must be NAME=SHARE.., got {options.experiments}")
    if options.kills < 1 or min(shares.values()) < 1:
        parser.error("--kills and shares must be >= 1")
    wanted = split(options.kills, shares)
    work = Work(options.work.absolute(), options.seed)
    series(work, wanted)
    print(table(work, wanted))
    bad = any(run.lost or run.different for run in work.done) or any(kill.left for kill in work.kills)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
