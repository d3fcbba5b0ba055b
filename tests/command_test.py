"""Commands as a user's terminal sees them: their streams, their environment, signals, and the compile cache."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOY = """
    import dataclasses, sys, time
    from pathlib import Path
    import numpy as np
    from experiments.lab.command import main
    from experiments.lab.config import Config
    from experiments.lab.folder import Folder
    from experiments.lab.progress import Progress
    from experiments.lab.table import Column, Row
    from gendiff.metrics import rates

    @dataclasses.dataclass(frozen=True)
    class ToyConfig(Config):
        pause: float = 0.0
        busy: float = 0.0

    def run(config):
        folder = Folder("toy", config)
        progress = Progress(folder)
        for phase in range(4):
            total = folder.archive.once(f"phase-{phase}", lambda: {"value": np.float32(phase) ** 2})
            progress("train", phase + 1, 4, {})
            print("phase", phase, file=sys.stderr, flush=True)
            time.sleep(config.pause)
        end = time.monotonic() + config.busy
        while time.monotonic() < end:  # such as a long computation
            sum(range(1000))
        rows = [Row("w\\u00e4rme \\u2500 \\U0001f600", {"value": rates.exact(float(total["value"]))})]
        return folder.finish(rows, [Column("value", "value")])

    if __name__ == "__main__":
        main(ToyConfig, {"default": ToyConfig()}, run)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with an experiment of its own, which starts as the project's do."""
    place = tmp_path_factory.mktemp("commands")
    (place / "toys").mkdir()
    (place / "toys" / "__init__.py").write_text("import experiments\n")
    (place / "toys" / "toy.py").write_text(textwrap.dedent(TOY))
    return place


def environment(place: Path, **more: str) -> dict[str, str]:
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "GENDIFF_", "PYTHON"))
    }
    paths = {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{place}",
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(place / "caches"),
    }
    return plain | paths | more


def command(place: Path, *words: str, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *words], cwd=place, env=environment(place, **more), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen, seconds: float = 120) -> tuple[int, list[str], str]:
    """Status, the lines of standard error without bars, and standard output."""
    out, err = process.communicate(timeout=seconds)
    lines = [line for line in re.split("[\r\n]+", err) if line.strip() and not line.startswith(("phase ", "train"))]
    return process.returncode, lines, out


def wait_for(process: subprocess.Popen, text: str) -> None:
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"no {text!r}: status {process.wait()}")


# The environment.


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("JAX_NUM_CPU_DEVICES", "abc", "JAX_NUM_CPU_DEVICES must be a whole number >= 1, got 'abc'"),
        ("JAX_NUM_CPU_DEVICES", "0", "JAX_NUM_CPU_DEVICES must be a whole number >= 1, got '0'"),
        ("JAX_NUM_CPU_DEVICES", "-1", "JAX_NUM_CPU_DEVICES must be a whole number >= 1, got '-1'"),
        ("JAX_ENABLE_X64", "maybe", "JAX refuses a variable of the environment: "),
        ("JAX_PLATFORMS", "nonsense", "JAX finds no device with JAX_PLATFORMS='nonsense': "),
        ("JAX_PLATFORMS", "cuda", "JAX finds no device with JAX_PLATFORMS='cuda': "),
    ],
)
def test_a_bad_variable_is_one_line_and_status_2(variable, value, said, place):
    status, lines, out = ended(command(place, "toys.toy", **{variable: value}))
    assert (status, out) == (2, "")
    assert lines[0].startswith(f"error: {said}")
    assert lines[1:] in ([], ["(GENDIFF_TRACEBACK=1 shows where)"])


# Streams.


def shell(place: Path, line: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], cwd=place, env=environment(place, PYTHON=sys.executable, **more),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(redirection, place):
    done = shell(place, f"$PYTHON -m experiments.tables --help {redirection}")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_goes_is_no_error(place):
    done = shell(place, "$PYTHON -m experiments.tables --help | head -1 >&2")
    assert done.returncode in (0, 141)
    assert done.stderr.startswith("usage: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"COLUMNS": "1"}],
)
def test_any_terminal_can_show_the_help(variables, place):
    done = shell(place, "$PYTHON -m experiments.tables --help", TERM="dumb", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--join-commits" in done.stdout
    assert len(done.stdout.splitlines()) < 60
    assert "COLUMNS" in variables or done.stdout.isascii()


# Signals.


def test_ctrl_c_stops_a_run_which_then_goes_on(place):
    folder = place / "stopped"
    process = command(place, "toys.toy", "--output", str(folder), "--pause", "0.3")
    wait_for(process, "phase 0")
    os.killpg(process.pid, signal.SIGINT)
    status, lines, _ = ended(process)
    assert status == 130
    assert len(lines) == 1
    assert re.fullmatch(
        r"stopped by Ctrl-C \(SIGINT\): every .*phase that was finished is stored; the same .*", lines[0]
    )
    assert not (folder / "results.json").exists()
    # It goes on, here at a terminal that lacks some letters of the table.
    resumed = command(place, "toys.toy", "--output", str(folder), "--pause", "0.3", PYTHONIOENCODING="ascii")
    status, _, out = ended(resumed)
    assert status == 0
    assert "| w\\xe4rme - \\U0001f600 |" in out
    (row,) = json.loads((folder / "results.json").read_text())["rows"]
    assert (row["name"], row["metrics"]["value"]["value"]) == ("w\u00e4rme \u2500 \U0001f600", 9.0)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_at_the_start_is_one_line(number, status, place):
    process = command(place, "toys.toy", "--output", str(place / "start"))
    time.sleep(0.5)
    while (
        not Path(f"/proc/{process.pid}/maps").exists() or "numpy" not in Path(f"/proc/{process.pid}/maps").read_text()
    ):
        time.sleep(0.01)  # libraries are imported
    os.killpg(process.pid, number)
    found, lines, _ = ended(process)
    assert found == status
    assert len(lines) == 1
    assert lines[0].startswith("stopped by ")


def test_the_second_ctrl_c_ends_at_once(place):
    process = command(place, "toys.toy", "--output", str(place / "twice"), "--busy", "100")
    wait_for(process, "phase 3")
    time.sleep(0.3)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    process.send_signal(signal.SIGINT)
    status, lines, _ = ended(process)
    assert time.monotonic() - start < 10
    assert (status, len(lines)) == (130, 1)


@pytest.mark.parametrize(("name", "status"), [("INT", 0), ("TERM", 75)])
def test_what_a_script_starts_with_an_ampersand_heeds_sigterm_alone(name, status, place):
    # POSIX: such a command begins with SIGINT switched off, so that Ctrl-C for the script's foreground spares it.
    folder = place / f"background-{name}"
    begin = f'"$PYTHON" -m toys.toy --output {folder} --pause 0.3 2>{place}/{name}.log & child=$!'
    stop = f"until grep -q 'phase 1' {place}/{name}.log; do sleep 0.05; done; kill -{name} $child; wait $child"
    done = shell(place, f"{begin}; {stop}")
    assert done.returncode == status, done.stderr


# The compile cache.

CACHES = """
    import json, os, sys
    from pathlib import Path
    from experiments.lab import start
    import jax

    def started(settings, work):
        read, write = os.pipe()
        if os.fork() == 0:
            for name, value in settings.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
            try:
                start.start()
                work()
                os.write(write, str(jax.config.jax_compilation_cache_dir).encode())
            except BaseException as error:
                os.write(write, repr(error).encode())
            sys.stderr.flush()
            os._exit(0)
        os.close(write)
        os.wait()
        return os.read(read, 4096).decode()

    base = Path(sys.argv[1])
    quiet = lambda: None
    compiled = lambda: jax.jit(lambda x: x + 1)(1.0)
    found = {}
    for mode in (0o700, 0o755, 0o777, 0o775):
        folder = base / f"{mode:o}" / "gendiff" / "jax"
        folder.mkdir(parents=True)
        folder.chmod(mode)
        found[f"{mode:o}"] = started({"XDG_CACHE_HOME": str(base / f"{mode:o}")}, quiet)
    above = base / "above"
    above.mkdir()
    above.chmod(0o777)
    found["above"] = started({"XDG_CACHE_HOME": str(above)}, quiet)
    if os.getuid() == 0:
        other = base / "other" / "gendiff" / "jax"
        other.mkdir(parents=True)
        os.chown(other, 12345, 12345)
        found["other"] = started({"XDG_CACHE_HOME": str(base / "other")}, quiet)
    os.environ["HOME"] = str(base / "home")
    for name, value in (("empty", ""), ("relative", "some/folder"), ("unset", None)):
        found[name] = started({"XDG_CACHE_HOME": value}, quiet)
    for name, value in (("homeless", ""), ("relative home", "home")):
        found[name] = started({"XDG_CACHE_HOME": "", "HOME": value}, quiet)
    print("== torn", file=sys.stderr, flush=True)
    torn = {"XDG_CACHE_HOME": str(base / "torn")}
    started(torn, compiled)
    entries = [path for path in (base / "torn").rglob("*-cache")]
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[:100])
    for run in range(2):
        print("== run", run, file=sys.stderr, flush=True)
        started(torn, compiled)
    print(json.dumps(found))
"""


def test_the_compile_cache_is_private_and_whole(place, tmp_path):
    (place / "caches.py").write_text(textwrap.dedent(CACHES))
    done = subprocess.run(
        [sys.executable, "caches.py", str(tmp_path)], cwd=place, env=environment(place), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    used = {name: str(tmp_path / name / "gendiff" / "jax") for name in ("700", "755")}
    home = str(tmp_path / "home" / ".cache" / "gendiff" / "jax")
    expected = used | {"777": "None", "775": "None", "above": "None", "empty": home, "relative": home, "unset": home}
    expected |= {"homeless": "None", "relative home": "None"}
    assert {name: value for name, value in found.items() if name != "other"} == expected
    assert found.get("other", "None") == "None"
    assert oct((tmp_path / "home" / ".cache").stat().st_mode)[-3:] == "700"
    assert not any((place / name).exists() for name in ("gendiff", "some", "home", ".cache"))
    said, torn = done.stderr.split("== torn")
    warnings = said.strip().splitlines()
    assert len(warnings) == 5 + ("other" in found)
    assert all(line.startswith("warning: no compile cache: ") for line in warnings)
    assert "has mode 777, so others can change its files" in warnings[0]
    _, first, second = torn.split("== run ")
    lines = first.splitlines()[1:]
    assert lines
    assert all(line.startswith("warning: removed the entries of ") for line in lines)
    assert second.splitlines()[1:] == []
