"""Two runs do not write into one folder."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from experiments.lab import lock
from experiments.lab.config import Config, ConfigError
from experiments.lab.folder import Folder

HOLD = """
import sys, time
from pathlib import Path
from experiments.lab import lock
lock.take(Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def other(folder):
    """Another process that has the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), "a\nb"], stdout=subprocess.PIPE, text=True
    ) as found:
        try:
            assert found.stdout.readline() == "taken\n"
            yield found
        finally:
            found.kill()


def test_a_folder_in_use_is_refused_and_says_who_uses_it(tmp_path):
    config = Config(output=tmp_path)
    with other(tmp_path) as process:
        who = f"process {process.pid} on {socket.gethostname()} since 20[0-9: -]+: .*python"
        with pytest.raises(ConfigError, match=rf"no other run uses, got {tmp_path}: wait .* \({who}") as raised:
            Folder("tiny", config)
        assert "a b" in str(raised.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock"]
        process.send_signal(signal.SIGKILL)
        process.wait()
        Folder("tiny", config).log(a=1)  # the kernel unlocks


def test_a_finished_run_lets_another_one_in_and_one_process_may_come_again(tmp_path):
    folder = Folder("tiny", Config(output=tmp_path))
    Folder("tiny", Config(output=tmp_path))
    folder.finish([], [])
    with other(tmp_path):
        pass


def test_a_removed_folder_is_locked_anew(tmp_path):
    lock.take(tmp_path)
    (tmp_path / ".lock").unlink()
    lock.take(tmp_path)
    with open(tmp_path / ".lock", "r+") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.release(tmp_path)


def test_a_silent_holder_on_another_host_counts_as_lost(tmp_path, capsys):
    path = tmp_path / ".lock"
    path.write_text("process 7 on elsewhere since 2026-01-01 00:00:00: python")
    with open(path, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(lock.Taken, match="process 7 on elsewhere"):
            lock.take(tmp_path)
        os.utime(path, (time.time() - 1000,) * 2)
        lock.take(tmp_path)
        assert "process 7 on elsewhere" in capsys.readouterr().err
        path.write_text(f"process 7 on {socket.gethostname()} since 2026-01-01 00:00:00: python")
        os.utime(path, (time.time() - 1000,) * 2)
        with pytest.raises(lock.Taken):  # of this host the kernel knows better
            lock.take(tmp_path)


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    Folder("tiny", Config(output=tmp_path)).finish([], [])
    assert "no lock (Operation not supported): start no second run in this folder" in capsys.readouterr().err
