"""What the commands of the project share: exit statuses, signals, output and the children they start.

`python -m gendiff...` and `python -m experiments...` call `starting` before they import a library, which takes seconds.
A library that is imported elsewhere changes nothing.
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
"""Exit statuses: an error that the user can mend; another process of the run was lost; stopped by SIGTERM; stopped by
Ctrl-C; nobody reads the output (as SIGPIPE). After the last four the same command goes on (75 is EX_TEMPFAIL of
sysexits.h)."""
STATUS = {signal.SIGTERM: STOPPED, signal.SIGINT: INTERRUPTED}
"""Signals that ask a command to stop, and its exit status."""
PATIENCE = 2.0
"""Seconds after Ctrl-C until the user is told that the command is still busy."""

TWICE = 0.3
"""Seconds after Ctrl-C in which another one is the same."""

closed: list[int] = []
"""Streams (0 input, 1 output, 2 errors) that were closed when the process began."""
notices: list[int] = []
"""Signals that asked this process to stop, since `heed`."""


# Start.


def starting() -> None:
    """Prepare the process of a command: its signals, its streams, and errors of the environment.

    A signal ends the command with one line until `heed`; nothing has been computed by then.
    """
    _open_streams()
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="plain")
    atexit.register(_flush)
    if shutil.get_terminal_size().columns < 40:  # a terminal of width 0 or 1: help of a letter a line
        os.environ["COLUMNS"] = "80"
    for number in _heeded():
        signal.signal(number, _end)
    sys.excepthook = _refused
    devices = os.environ.get("JAX_NUM_CPU_DEVICES")
    if devices and (not devices.isdecimal() or int(devices) < 1):
        fail(f"JAX_NUM_CPU_DEVICES must be a whole number >= 1, got {devices!r}: change it, or unset it")


def _heeded() -> list[signal.Signals]:
    """The signals that stop a command, but for those that whoever started it has switched off (`nohup`, `&`)."""
    return [number for number in STATUS if signal.getsignal(number) is not signal.SIG_IGN]


def _end(number: int, frame: FrameType | None = None) -> NoReturn:
    """End the process for a signal; not by an exception, because callbacks of libraries swallow those."""
    start = "\n" if os.isatty(2) else ""  # after a bar
    _write(f"{start}{stopped_by(number)}: what was stored is complete; the same command goes on from there\n")
    os._exit(STATUS[signal.Signals(number)])


def stopped_by(number: int) -> str:
    """Begin the line that says which signal has stopped a command."""
    return f"stopped by {'Ctrl-C (SIGINT)' if number == signal.SIGINT else 'a notice (SIGTERM)'}"


def _write(text: str) -> None:
    """Write to the terminal without the locks of `sys.stderr`, which the interrupted code may hold."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def _refused(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show what no command has caught: values of the environment that JAX refuses when it is imported are one line."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(trace)]
    if isinstance(error, ValueError) and "jax" in names and "jax" not in sys.modules:
        fail(f"JAX refuses a variable of the environment: {error}")
    sys.__excepthook__(kind, error, trace)


def fail(message: str) -> NoReturn:
    """End the process for an error that the user can mend, before there is anything to be closed."""
    _write(f"error: {message}\n")
    os._exit(BAD_INPUT)


# Streams.


def _open_streams() -> None:
    """Put the null device where a stream is closed (`>&-`): the next file that is opened would take its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the least number that is free
            closed.append(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Stand-ins for letters that a terminal cannot show: frames as -, | and +, and escapes."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    return "".join(_stand_in(letter) for letter in letters), error.end


def _stand_in(letter: str) -> str:
    name = unicodedata.name(letter, "")
    if name.startswith("BOX DRAWINGS"):
        return {"HORIZONTAL": "-", "VERTICAL": "|"}.get(name.split()[-1], "+")
    return letter.encode("ascii", "backslashreplace").decode()


def say(text: str) -> None:
    """Print a command's answer; quietly nothing where nobody reads it any more (`| head -1`).

    Raises:
      OSError: standard output cannot be written, such as a file on a full disk.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _silence()
    except OSError as error:
        _silence()
        raise OSError(error.errno, f"standard output could not be written ({error.strerror})") from None


def _silence() -> None:
    """Send what is still to be written to the null device, else Python complains of it at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
    except (OSError, ValueError):  # Python says it
        pass


# Stopping.


def heed() -> None:
    """From now on SIGTERM and Ctrl-C are notices, in `notices`, which the command looks at where it can stop.

    A second Ctrl-C ends the process at once.  A thread listens for it, because Python's own handlers wait until a
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
    """Count Ctrl-C; `sender` is here to stay open."""
    first = 0.0
    told = False
    while True:
        if first and not told and not select.select([receiver], [], [], PATIENCE)[0]:
            _write("\nstopping where everything is stored; a second Ctrl-C stops at once\n")
            told = True
        for number in receiver.recv(64):
            if number != signal.SIGINT:
                continue
            # `timeout` and some terminals send the first one twice, to the process and to its group.
            if first and time.monotonic() - first > TWICE:
                _end(number)
            first = first or time.monotonic()


def noticed() -> bool:
    """Whether this process has been asked to stop."""
    return bool(notices)


# Children.


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Start children that get neither Ctrl-C nor SIGTERM, which go to all processes of a terminal: their parent ends
    them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)  # which children inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(closed: Callable[[], Any]) -> None:
    """In a child: end it, whatever it is at, when `closed` returns or raises: it reads from a pipe of the parent."""

    def wait() -> None:
        try:
            closed()
        finally:
            os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
