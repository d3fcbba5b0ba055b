"""Exit statuses, signals, output and children of the project's commands.

`python -m gendiff...` and `python -m experiments...` call `starting` before they import libraries, because that takes
seconds.  An import of gendiff elsewhere changes no process state.
"""

import atexit
import codecs
import contextlib
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, NoReturn

BAD_INPUT, LOST, STOPPED, INTERRUPTED, UNREAD = 2, 70, 75, 130, 141
"""Exit statuses: an error that the user can repair; a lost process of the run; SIGTERM (EX_TEMPFAIL of sysexits.h);
Ctrl-C; no reader of the output (as SIGPIPE).  After the last four the same command goes on."""
STATUS = {signal.SIGTERM: STOPPED, signal.SIGINT: INTERRUPTED}
"""Signals that ask a command to stop, and its exit status."""
PATIENCE = 2.0
"""Seconds from Ctrl-C until a message says that the command is still busy."""
TWICE = 0.3
"""Seconds after Ctrl-C in which a second one counts as a repetition."""
closed: list[int] = []
"""Streams (0 input, 1 output, 2 errors) that were closed when the process began."""
notices: list[int] = []
"""Signals that asked this process to stop, since `heed`."""


# Start.


def starting() -> None:
    """Prepare the signals and streams of a command, and check its environment.

    Until `heed` a signal ends the command with one line, because nothing is computed by then.
    """
    _open_streams()
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")
    atexit.register(_flush)
    if shutil.get_terminal_size().columns < 40:  # because a terminal of width 0 or 1 gets help of one letter a line
        os.environ["COLUMNS"] = "80"
    for number in _heeded():
        signal.signal(number, _end)
    sys.excepthook = _refused
    devices = os.environ.get("JAX_NUM_CPU_DEVICES")
    if devices and (not devices.isdecimal() or int(devices) < 1):
        fail(f"JAX_NUM_CPU_DEVICES must be a whole number >= 1, got {devices!r}: change it, or unset it")


def _heeded() -> list[signal.Signals]:
    """The signals that stop a command, except the signals that its parent ignores (`nohup`, `&`)."""
    return [number for number in STATUS if signal.getsignal(number) is not signal.SIG_IGN]


def _end(number: int, frame: FrameType | None = None) -> NoReturn:
    """End the process for a signal, without an exception, because callbacks of libraries swallow exceptions."""
    start = "\n" if os.isatty(2) else ""  # because a progress bar may be on the line
    _write(f"{start}{stopped_by(number)}: all stored results are complete; the same command goes on from there\n")
    os._exit(STATUS[signal.Signals(number)])


def stopped_by(number: int) -> str:
    """The beginning of the line about a stop by a signal."""
    return f"stopped by {'Ctrl-C (SIGINT)' if number == signal.SIGINT else 'a notice (SIGTERM)'}"


def _write(text: str) -> None:
    """Write to the terminal without `sys.stderr`, because the interrupted code may hold its lock."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _refused(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an uncaught exception; one line if JAX, at its import, refuses a value of the environment."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]
    if isinstance(error, ValueError) and "jax" in names and "jax" not in sys.modules:
        fail(f"JAX refuses a variable of the environment: {error}")
    sys.__excepthook__(kind, error, trace)


def fail(message: str) -> NoReturn:
    """End the process at once for an error that the user can repair, when no file is open."""
    _write(f"error: {message}\n")
    os._exit(BAD_INPUT)


# Streams.


def _open_streams() -> None:
    """Open the null device for a closed stream (`>&-`), because the next file would take its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the least number that is free
            closed.append(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (stays open)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replace letters that a terminal cannot show: frames by -, | and +, others by escapes."""
    assert isinstance(error, UnicodeEncodeError)

    def replacement(letter: str) -> str:
        name = unicodedata.name(letter, "")
        if name.startswith("BOX DRAWINGS"):
            return {"HORIZONTAL": "-", "VERTICAL": "|"}.get(name.split()[-1], "+")
        return letter.encode("ascii", "backslashreplace").decode()

    return "".join(map(replacement, error.object[error.start : error.end])), error.end


def say(text: str) -> None:
    """Print a command's answer; print nothing if its reader is gone (`| head -1`).

    Raises:
      OSError: standard output cannot be written, for example on a full disk.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _silence()
    except OSError as error:
        _silence()
        raise OSError(error.errno, f"standard output could not be written ({error.strerror})") from None


def _silence() -> None:
    """Send pending output to the null device, because Python complains about it at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
    except (OSError, ValueError):  # Python reports it at exit
        pass


# Stopping.


def heed() -> None:
    """Record SIGTERM and Ctrl-C in `notices` from now on; the command checks it where it can stop.

    A second Ctrl-C ends the process at once.  A thread listens for it, because Python's handlers wait until a
    compilation or a computation returns.
    """
    numbers = _heeded()
    for number in numbers:
        signal.signal(number, lambda number, frame: notices.append(number))
    if signal.SIGINT in numbers:
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        listener = threading.Thread(target=_listen, args=(receiver, sender), name="Ctrl-C", daemon=True)
        listener.start()


def _listen(receiver: socket.socket, sender: socket.socket) -> None:
    """Count Ctrl-C; the argument `sender` keeps it open."""
    first = 0.0
    informed = False
    while True:
        if first and not informed and not select.select([receiver], [], [], PATIENCE)[0]:
            _write("\nstopping after the next result is stored; a second Ctrl-C stops at once\n")
            informed = True
        for number in receiver.recv(64):
            if number != signal.SIGINT:
                continue
            # `timeout` and some terminals send the first one twice, to the process and to its group.
            if first and time.monotonic() - first > TWICE:
                _end(number)
            first = first or time.monotonic()


def noticed() -> bool:
    """Return True if a signal has asked this process to stop."""
    return bool(notices)


# Children.


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Start children that ignore the Ctrl-C and SIGTERM of the terminal, because their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)  # children inherit the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(closed: Callable[[], Any]) -> None:
    """In a child: exit at once when `closed`, which reads from a pipe of the parent, returns or raises."""

    def wait() -> None:
        try:
            closed()
        finally:
            os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
