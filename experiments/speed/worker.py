"""A process of its own for each framework, since their thread pools fight within one.

A side is a module with `prepare(setup) -> (programs, answers)`: `programs` are functions without arguments, by name,
and `answers` is what the parent compares before it times anything.  `serve` runs a side, a `Worker` is the parent's
end.
"""

import importlib
import os
import pickle
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from gendiff import command

Programs: TypeAlias = Mapping[str, Callable[[], Any]]
Prepare: TypeAlias = Callable[[Mapping[str, Any]], tuple[Programs, Any]]


class Worker:
    """A side in a process that lives until `close`; every call waits for its answer, so that only one side works."""

    def __init__(self, module: str, setup: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.module = module
        search = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        with command.shielded():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.speed.worker", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), **environment},
            )
        self.answers = self._ask(dict(setup))

    def seconds(self, program: str) -> float:
        """Wall-clock seconds of one call of a program.

        Raises:
          ChildProcessError: the program failed, or the process has ended.
        """
        return self._ask(program)

    def _ask(self, message: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()
            failure, answer = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError):
            raise ChildProcessError(f"{self.module}: ended with status {self.process.wait()}") from None
        if failure:
            raise ChildProcessError(f"{self.module}: {failure}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def serve(prepare: Prepare) -> None:
    """Answers requests until the parent closes the pipe, or ends: first the set-up, then names of programs to time."""
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        while True:
            requests.put(pickle.load(sys.stdin.buffer))

    command.end_with(listen)
    programs: Programs = {}
    failure: str
    answer: Any
    while True:
        message = requests.get()
        failure, answer = "", None
        try:
            if isinstance(message, str):
                start = time.perf_counter()
                programs[message]()
                answer = time.perf_counter() - start
            else:
                programs, answer = prepare(message)
        except Exception as error:  # told to the parent, which decides
            lines = str(error).strip().splitlines() or [""]
            failure = f"{type(error).__name__}: {lines[0]}"
        pickle.dump((failure, answer), answers)
        answers.flush()


if __name__ == "__main__":
    serve(importlib.import_module(sys.argv[1]).prepare)
