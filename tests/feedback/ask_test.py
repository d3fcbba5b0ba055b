"""The page opens, waits for enough labels and closes; the command line says what is wrong in one line."""

import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gendiff.feedback import __main__ as program
from gendiff.feedback import ask, labels, samples
from gendiff.feedback.ask import Options
from gendiff.feedback.labels import LabelError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "samples.npy", np.random.default_rng(0).normal(size=(6, 2)))
    return tmp_path


def mark(folder, text, rater="anna"):
    found = samples.load(folder)
    names = {"m": "malign", "u": "undecided", "b": "benign"}
    said = [labels.mark(found.ids[i], found.hashes[i], names[each], rater, 1.0) for i, each in enumerate(text)]
    labels.append(folder / "labels.jsonl", said)


def test_enough_labels_need_no_page(folder):
    mark(folder, "mbbm")
    found = ask.ask(folder, 2, 2, show=pytest.fail)
    assert (found.malign.tolist(), found.benign.tolist()) == ([0, 3], [1, 2])


def test_the_page_closes_when_there_are_enough(folder):
    shown, answers = queue.Queue(), queue.Queue()
    options = Options(port=0, meaning="far out", rater="anna")
    thread = threading.Thread(target=lambda: answers.put(ask.ask(folder, 1, 2, options, grace=0.1, show=shown.put)))
    thread.start()
    text = shown.get(timeout=300)
    port = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=", text)[1]
    assert f"ssh -N -L {port}:127.0.0.1:{port} " in text
    assert "6 points" in text
    mark(folder, "mb")
    time.sleep(0.5)
    assert thread.is_alive()
    mark(folder, "mbub")
    thread.join(timeout=300)
    found = answers.get(timeout=1)
    assert (found.malign.tolist(), found.benign.tolist()) == ([0], [1, 3])
    assert labels.meaning(folder / "labels.jsonl") == "far out"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)


def test_too_few_labels_are_an_error_that_loses_nothing(folder):
    mark(folder, "mu")
    board = ask.make_board(folder, Options(), need=(1, 1))
    board.finished.set()  # the rater closes the page
    ask.hold(board, Options(port=0), show=lambda text: None)
    with pytest.raises(LabelError, match=r"must be at least 1 malign and 1 benign, got 1 malign and 0 benign"):
        ask.consensus.classes(board.samples, board.refresh().marks)
    assert len(labels.read(folder / "labels.jsonl")) == 2


def test_an_occupied_port_is_named(folder):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"--port must be a free port of 127.0.0.1, got {port}"):
            ask.ask(folder, options=Options(port=port))
    with pytest.raises(OSError, match="must be an address of this machine"):
        ask.listen("no.such.host.invalid", 0)


def test_labels_of_other_samples_open_no_page(folder):
    mark(folder, "mb")
    before = (folder / "labels.jsonl").read_bytes()
    np.save(folder / "samples.npy", np.random.default_rng(1).normal(size=(6, 2)))
    with pytest.raises(LabelError, match="label of sample 0 must have the content hash"):
        ask.ask(folder, show=pytest.fail)
    assert (folder / "labels.jsonl").read_bytes() == before


def test_what_is_printed_fits_the_host(folder):
    board = ask.make_board(folder, Options())
    text = ask.invitation(board, Options(host="0.0.0.0"), "http://machine:8765/?token=x")
    assert "-N -L 8765:127.0.0.1:8765" in text
    assert "warning: 0.0.0.0 lets other machines in" in text
    assert "warning" not in ask.invitation(board, Options(host="::1"), "http://[::1]:8765/?token=x")


NO_WEB = """
import sys
sys.modules["starlette"] = sys.modules["uvicorn"] = None
from pathlib import Path
from gendiff.feedback import ask
print(ask.ask(Path(sys.argv[1]), benign=int(sys.argv[2])))
"""


@pytest.mark.parametrize(("benign", "status"), [(1, 0), (2, 1)])
def test_labels_that_are_there_need_no_web_library(folder, benign, status):
    mark(folder, "mb")
    command = [sys.executable, "-c", NO_WEB, str(folder), str(benign)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == status
    assert ("pip install 'gendiff[feedback]'" in done.stderr) == bool(status)


def run(*arguments, env=(), **options):
    environment = {**os.environ, "GENDIFF_TRACEBACK": "", "COLUMNS": "100", **dict(env)}
    command = [sys.executable, "-m", "gendiff.feedback", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options)


def test_the_command_explains_itself():
    text = run("--help").stdout
    for word in (
        "--labels",
        "--kind",
        "--meaning",
        "--rater",
        "--columns",
        "--host",
        "--port",
        "--report",
        "SSH tunnel",
    ):
        assert word in text


def test_the_command_reports(folder):
    mark(folder, "mbb")
    mark(folder, "mbm", "bob")
    done = run(folder, "--report")
    assert done.returncode == 0
    assert "3 of 6 points marked: 1 malign, 1 undecided, 1 benign" in done.stdout
    assert "anna and bob: 67 % equal on 3" in done.stdout


def test_the_command_s_errors_are_one_line(folder):
    for arguments, message in (
        ([folder / "none"], "must be a folder"),
        ([folder, "--report"], "labels.jsonl must be a file of labels, got none"),
        ([folder, "--columns", "0"], "--columns must be >= 1 and <= 40 and whole, got 0"),
        ([folder, "--kind", "image"], "as images must be"),
    ):
        done = run(*arguments)
        assert done.returncode == 2
        assert re.match(rf"error: .*{re.escape(message)}", done.stderr), done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_the_command_stops_with_all_marks(folder, stop):
    command = [sys.executable, "-m", "gendiff.feedback", str(folder), "--port", "0", "--rater", "anna"]
    # What a shell starts in the background ignores SIGINT, and so would the page.
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)
    page = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, heeded)
    lines = []
    while not lines or "Ctrl-C" not in lines[-1]:
        lines.append(page.stdout.readline())
    assert "/?token=" in "".join(lines)
    mark(folder, "mb")
    page.send_signal(stop)
    output, errors = page.communicate(timeout=300)
    assert errors == ""
    assert ("2 of 6 points marked: 1 malign, 0 undecided, 1 benign" in output) == (stop == signal.SIGINT)
    assert len(labels.read(folder / "labels.jsonl")) == 2


def complaint(capsys, monkeypatch, *arguments):
    """What the command says of wrong arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["feedback", *map(str, arguments)])
    monkeypatch.delenv("GENDIFF_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as left:
        program.main()
    assert left.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert (error.startswith("error: "), hint) == (True, "(GENDIFF_TRACEBACK=1 shows where)")
    return error


@pytest.mark.parametrize("more", [[], ["--report"]])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "99999"], "--port must be >= 0 and <= 65535 and whole, got 99999"),
        (["--port", "-1"], "--port must be >= 0 and <= 65535 and whole, got -1"),
        (["--malign", "-1"], "--malign must be >= 0 and whole, got -1"),
        (["--benign", "-2", "--malign", "1"], "--benign must be >= 0 and whole, got -2"),
        (["--columns", "41"], "--columns must be >= 1 and <= 40 and whole, got 41"),
        (["--rater", "x" * 65], "rater must be Unicode text of at most 64 characters"),
        (["--rater", "a\nb"], r"rater must be a name of printable characters, got 'a\nb'"),
        (["--rater", "b\udce9la"], r"rater must be Unicode text of at most 64 characters, got 'b\udce9la'"),
        (["--meaning", "half \ud83d"], r"text must be Unicode text of at most 4000 characters, got 'half \ud83d'"),
    ],
)
def test_values_out_of_range_are_one_line(folder, capsys, monkeypatch, arguments, message, more):
    assert message in complaint(capsys, monkeypatch, folder, *arguments, *more)
    assert not (folder / "labels.jsonl").exists()


def test_more_labels_than_samples_are_an_error_at_once(folder, capsys, monkeypatch):
    message = "--malign and --benign together must be <= 6, got 7"
    assert message in complaint(capsys, monkeypatch, folder, "--malign", 4, "--benign", 3)
    with pytest.raises(ValueError, match=message):
        ask.ask(folder, 6, 1)
    for grace in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="grace must be >= 0, got"):
            ask.ask(folder, 1, 1, Options(port=0), grace=grace)


def test_labels_that_are_a_link_open_no_page(folder, capsys, monkeypatch, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "new"
    (folder / "labels.jsonl").symlink_to(outside)
    said = complaint(capsys, monkeypatch, folder)
    assert "it must be a regular file, got a link (name the file that it leads to)" in said
    assert "it must be a regular file, got a link" in complaint(capsys, monkeypatch, folder, "--report")
    assert not outside.exists()


def test_what_is_left_out_is_said_and_reported(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.full((4, 4), ord(name[0]), np.uint8)).save(tmp_path / name)
    (tmp_path / "c.gif").write_bytes(b"")
    board = ask.make_board(tmp_path, Options())
    assert "  left out   1 .gif" in ask.invitation(board, Options(), "http://x:1/?token=x")
    assert "left out of the samples: 1 .gif" in ask.consensus.report(board.samples, [])


def test_an_output_of_few_characters_gets_the_others_escaped(folder):
    mark(folder, "m", "béla ✓")
    done = run(folder, "--report", env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "b\\xe9la \\u2713: 1 malign" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")
@pytest.mark.parametrize(
    ("redirection", "message"),
    [(">&-", "standard output must be open"), (">/dev/full", "standard output could not be written (No space")],
)
def test_an_output_that_cannot_be_written_is_one_line(folder, redirection, message):
    if redirection.endswith("full") and not Path("/dev/full").exists():
        pytest.skip("no device that is full")
    mark(folder, "m")
    command = f'exec "{sys.executable}" -m gendiff.feedback "{folder}" --report {redirection}'
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: .*{re.escape(message)}.*\n\(GENDIFF_TRACEBACK=1 shows where\)\n", done.stderr)


BARE = """
import sys
sys.modules |= dict.fromkeys(["starlette", "uvicorn", "PIL"])
from gendiff.feedback import __main__
_, points, images = sys.argv
for arguments in (["--help"], [points, "--report"], [points, "--port", "0"], [images, "--port", "0"]):
    sys.argv = ["feedback", *arguments]
    try:
        __main__.main()
    except SystemExit as left:
        print("left with", left.code, flush=True)
"""


def test_help_and_points_need_no_packages_of_the_page(folder, tmp_path_factory):
    pictures = tmp_path_factory.mktemp("pictures")
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(pictures / "a.png")
    mark(folder, "mb")
    command = [sys.executable, "-c", BARE, str(folder), str(pictures)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert re.search(r"(?s)--meaning.*left with 0\n2 of 6 points marked.*left with 2\nleft with 2\n", done.stdout)
    assert len(re.findall(r"(?m)^error: .* pip install 'gendiff\[feedback\]'$", done.stderr)) == 2
    assert "Traceback" not in done.stderr


def test_labels_that_vanish_close_no_page(folder, capsys, tmp_path_factory):
    board = ask.make_board(folder, Options(rater="anna"))
    mark(folder, "mb")
    board.refresh()
    elsewhere, path, said = tmp_path_factory.mktemp("elsewhere") / "folder", folder / "labels.jsonl", ""
    options = {"show": lambda text: None}
    thread = threading.Thread(target=ask.hold, args=(board, Options(port=0)), kwargs=options, daemon=True)
    thread.start()

    def until(condition):
        end = time.monotonic() + 100
        while not condition() and time.monotonic() < end:
            time.sleep(0.02)
        assert condition()

    def told():
        nonlocal said
        said += capsys.readouterr().err
        return "could not be written" in said

    folder.rename(elsewhere)
    until(told)
    assert said.startswith("warning: labels ")
    elsewhere.rename(folder)
    path.unlink()
    until(lambda: path.exists() and len(labels.read(path)) == 2)
    assert thread.is_alive()
    board.finished.set()
    thread.join(timeout=100)
    assert not thread.is_alive()
