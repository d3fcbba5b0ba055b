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
    with pytest.raises(LabelError, match=r"expected at least 1 malign and 1 benign, given 1 malign and 0 benign"):
        ask.consensus.classes(board.samples, board.refresh().marks)
    assert len(labels.read(folder / "labels.jsonl")) == 2


def test_an_occupied_port_is_named(folder):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=rf"--port {port}: expected a free port of 127.0.0.1, given one"):
            ask.ask(folder, options=Options(port=port))
    with pytest.raises(OSError, match="expected an address of this machine"):
        ask.listen("no.such.host.invalid", 0)


def test_labels_of_other_samples_open_no_page(folder):
    mark(folder, "mb")
    before = (folder / "labels.jsonl").read_bytes()
    np.save(folder / "samples.npy", np.random.default_rng(1).normal(size=(6, 2)))
    with pytest.raises(LabelError, match="label of sample 0: expected the content hash"):
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


def run(*arguments, **options):
    environment = {**os.environ, "GENDIFF_TRACEBACK": "", "COLUMNS": "100"}
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
        ([folder / "none"], "expected a folder"),
        ([folder, "--report"], "labels.jsonl: expected a file of labels, given none"),
        ([folder, "--columns", "0"], "--columns must be >= 1 and <= 40 and whole, got 0"),
        ([folder, "--kind", "image"], "as images: expected"),
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
