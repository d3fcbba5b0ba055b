"""Open the labelling page, and wait until the labels suffice."""

import contextlib
import dataclasses
import getpass
import ipaddress
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gendiff import check, command
from gendiff.feedback import consensus, labels, samples
from gendiff.feedback.board import Board
from gendiff.feedback.consensus import Classes
from gendiff.feedback.regular import shown
from gendiff.feedback.render import Up
from gendiff.feedback.samples import Kind, Samples

GRACE = 20.0
"""Seconds to wait after the last mark when the labels suffice, because the rater may take it back."""
FILE = samples.LABELS


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a page."""

    labels: Path | None = None
    """File of labels, created if missing, never overwritten. Default: labels.jsonl beside the samples."""
    kind: Kind | None = None
    """Kind of the samples. Default: inferred from type, shape and range."""
    up: Up = "y"
    """Vertical axis of motions."""
    meaning: str = ""
    """Meaning of "malign", such as "a seven with a stroke". The page shows and can change it; the file of labels keeps
    it."""
    rater: str = ""
    """Name of the person who marks; the page can change it. Default: the login name."""
    columns: int = 8
    """Columns of the grid; the page can change it."""
    host: str = "127.0.0.1"
    """Address to listen on. A non-loopback address lets other machines in, over an unencrypted connection."""
    port: int = 8765
    """Port to listen on; 0 takes a free one."""


def ask(
    place: Path,
    malign: int = 1,
    benign: int = 1,
    options: Options = Options(),
    grace: float = GRACE,
    show: Callable[[str], None] = command.say,
) -> Classes:
    """Return the labels of samples; if they do not suffice, open the page first and wait.

    The page closes when the rater ends it, after `grace` seconds without a mark if the labels suffice, or with Ctrl-C.
    The file of labels then holds every mark.

    Args:
      place: folder (or array file) of samples, see `samples.load`.
      malign: number of malign samples needed.
      benign: number of benign samples needed.
      options: options of the page.
      grace: seconds without a mark before the page closes.
      show: prints a text, such as the page's address.

    Raises:
      SampleError: the samples cannot be read.
      ValueError: `malign` + `benign` exceeds the number of samples, or an option is out of range.
      LabelError: the labels are damaged or of other samples, or too few when the page closed.
      OSError: the port is in use, or the file of labels cannot be written.
      ModuleNotFoundError: the page is needed, and its packages are not installed.
    """
    board = make_board(place, options, need=(malign, benign))
    if not board.refresh().enough:
        hold(board, options, grace, show)
    return consensus.classes(board.samples, board.refresh().marks, malign, benign)


def make_board(place: Path, options: Options, need: tuple[int, int] | None = None) -> Board:
    """Read the samples and their labels, and check that they belong together.

    Args:
      place: folder (or array file) of samples, see `samples.load`.
      options: options of the page.
      need: numbers of malign and benign samples needed.

    Raises:
      ValueError: an option is out of range, or `need` exceeds the number of samples.
      OSError: the file of labels cannot be written.
    """
    check_options(options, need)  # first, so that a bad option writes nothing
    rater = options.rater or _login()
    found = samples.load(place, options.kind)
    check.number("--malign and --benign together", sum(need or ()), at_most=len(found))
    board = Board(found, label_file(found, options), rater, options.columns, need, options.up)
    if options.meaning and options.meaning != board.refresh().meaning:
        board.add([labels.as_json(labels.Meaning(options.meaning, rater, time=labels.now()))])
    return board


def check_options(options: Options, need: tuple[int, int] | None = None) -> None:
    """Check the ranges of options and of the numbers of samples needed.

    Raises:
      ValueError: names the option.
    """
    check.number("--columns", options.columns, at_least=1, at_most=40, whole=True)
    check.number("--port", options.port, at_least=0, at_most=65535, whole=True)
    for name, count in zip(("--malign", "--benign"), need or (), strict=False):
        check.number(name, count, at_least=0, whole=True)
    try:
        labels.parse(labels.as_json(labels.Meaning(options.meaning, options.rater or _login())))
    except ValueError as error:
        raise ValueError(f"--meaning and --rater: {error}") from None


def label_file(found: Samples, options: Options) -> Path:
    """Return the path of the samples' file of labels."""
    return options.labels or found.folder / FILE


def hold(board: Board, options: Options, grace: float = GRACE, show: Callable[[str], None] = command.say) -> None:
    """Serve the page until it is finished (see `ask`), or until Ctrl-C."""
    check.number("grace", grace, at_least=0, infinite=True)
    with serving(board, options) as address:
        show(invitation(board, options, address))
        with contextlib.suppress(KeyboardInterrupt):
            _wait(board, grace)


@contextlib.contextmanager
def serving(board: Board, options: Options) -> Iterator[str]:
    """Context manager: serve the page in a thread; yield its address, with the token.

    Raises:
      ModuleNotFoundError: the extra `feedback` is not installed.
    """
    from gendiff.feedback import server  # here, because reading existing labels needs no web library

    token = secrets.token_urlsafe(24)
    with contextlib.closing(listen(options.host, options.port)) as listening:
        host, port = listening.getsockname()[:2]
        page = server.runner(board, token, loopback=_loopback(host))
        thread = threading.Thread(target=page.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while not page.started and thread.is_alive():
                time.sleep(0.01)
            if not page.started:
                raise OSError(f"--port {port}: the page could not be started")
            name = socket.gethostname() if host in ("0.0.0.0", "::") else _bracketed(host)
            yield f"http://{name}:{port}/?token={token}"
        finally:
            page.should_exit = True
            thread.join(timeout=10)


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
      OSError: the port is in use, or the address is not of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise OSError(f"--host must be an address of this machine, got {host}, port {port} ({error})") from None
    try:
        if os.name == "posix":  # on Windows the option would share the port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        raise OSError(
            f"--port must be a free port of {host}, got {port} ({error.strerror}): "
            "close the other page or name another port; 0 takes a free one"
        ) from None
    return listening


def invitation(board: Board, options: Options, address: str) -> str:
    """Return the text to print when the page opens: its address, and the ssh command for other machines."""
    port = address.partition("/?")[0].rpartition(":")[2]
    host = options.host if _loopback(options.host) else "127.0.0.1"
    tunnel = f"-N -L {port}:{_bracketed(host)}:{port}"
    lines = [
        f"{len(board.samples)} {board.samples.kind}s of {shown(board.samples.place)}; labels go to {shown(board.path)}",
        *([f"  left out   {board.samples.left_out}"] if board.samples.left_out else []),
        f"  open       {address}",
        "  from another machine, first run there",
        f"             ssh {tunnel} {_login()}@{socket.gethostname()}",
        f"  TPU VM     gcloud compute tpus tpu-vm ssh NAME --zone ZONE -- {tunnel}",
        "  Ctrl-C stops; every mark is on the disk at once.",
    ]
    if not _loopback(options.host):
        lines.append(f"  warning: {options.host} lets other machines in, and the connection is not encrypted.")
    return "\n".join(lines)


def _wait(board: Board, grace: float) -> None:
    seen, since, warned = -1, time.monotonic(), ""
    while not board.finished.wait(0.2) and not command.noticed():
        try:
            state = board.refresh()
        except (labels.LabelError, OSError) as error:  # the page shows it too, and resumes when the file is mended
            if str(error) != warned:
                warned = str(error)
                print(f"warning: {warned}", file=sys.stderr, flush=True)
            continue
        warned = ""
        if len(state.marks) != seen:
            seen, since = len(state.marks), time.monotonic()
        if state.enough and time.monotonic() - since >= grace:
            return


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        return "rater"
