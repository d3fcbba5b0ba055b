"""Runs of several processes with two virtual devices, compared with the same run in one process."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
WORKER = ROOT / "tests" / "processes" / "worker.py"


def environment(**more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "GENDIFF_"))}
    compiled = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    return plain | compiled | {"JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


class Job:
    """Processes of one run, with their output in files; the last one may have more arguments."""

    def __init__(self, processes: int, folder: Path, *arguments: str, last: tuple[str, ...] = (), **more: str) -> None:
        self.folder, address = folder, f"localhost:{free_port()}"
        self.processes = []
        for index in range(processes):
            variables = {} if processes == 1 else {
                "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index),
                "GENDIFF_HEARTBEAT_SECONDS": "10",
            }  # fmt: skip
            with self.log(index).open("w") as log:
                command = [sys.executable, *arguments, *(last if index == processes - 1 else ())]
                env = environment(**variables, **more)
                self.processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT))

    def log(self, index: int) -> Path:
        return self.folder / f"log-{index}.txt"

    def wait(self, seconds: float = 300) -> list[int]:
        """Their exit statuses; kills the processes that do not end in time."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def wait_for(self, text: str, index: int = 0, seconds: float = 200) -> None:
        end = time.monotonic() + seconds
        while text not in self.log(index).read_text():
            assert time.monotonic() < end, self.log(index).read_text()[-2000:]
            assert self.processes[index].poll() is None, self.log(index).read_text()[-2000:]
            time.sleep(0.05)


def finished(processes: int, folder: Path, mode: str, **more: str) -> dict[str, np.ndarray]:
    folder.mkdir(exist_ok=True)
    job = Job(processes, folder, str(WORKER), str(folder), mode, **more)
    statuses = job.wait()
    assert statuses == [0] * processes, "\n".join(job.log(index).read_text()[-3000:] for index in range(processes))
    return read(folder, mode)


def read(folder: Path, mode: str, index: int = 0) -> dict[str, np.ndarray]:
    with np.load(folder / f"{mode}-{index}.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Mode, processes -> the folder of such a run without disturbance; tests copy it before they change it."""

    @cache
    def folder(mode: str, processes: int = 1) -> Path:
        place = tmp_path_factory.mktemp(f"{mode}-of-{processes}")
        finished(processes, place, mode)
        return place

    return folder


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_everything_equals_one_process(undisturbed, processes):
    alone, many = (read(undisturbed("everything", n), "everything") for n in (1, processes))
    last = read(undisturbed("everything", processes), "everything", processes - 1)
    names = [name for name in alone if name != "['problems']"]
    assert len(names) == 43, "eighteen trainings of one array or two, losses, eleven samplers and estimates, a pool"
    for name in names:
        scale = np.abs(alone[name]).max()
        np.testing.assert_allclose(many[name], alone[name], rtol=1e-5, atol=1e-5 * scale, err_msg=name)
        np.testing.assert_array_equal(last[name], many[name], err_msg=f"{name} on the last process")


def test_what_one_process_says_reaches_the_others(undisturbed):
    problems = list(read(undisturbed("everything", 2), "everything", 1)["['problems']"])
    assert problems == [
        "Disagreement: the number must be equal on all 2 processes, got another on process 1",
        "Elsewhere: process 0: integer division or modulo by zero",
        "ZeroDivisionError: integer division or modulo by zero",
    ]


def failed(job: Job) -> list[str]:
    """The last errors of the processes, which must all end with the status of bad input, at about one time."""
    statuses = job.wait(120)
    texts = [job.log(index).read_text() for index in range(len(statuses))]
    assert statuses == [2] * len(statuses), "\n".join(text[-2000:] for text in texts)
    lines = [[line for line in text.splitlines() if "error: " in line] for text in texts]
    return [
        errors[-1].split("error: ")[1] if errors else text[-2000:] for errors, text in zip(lines, texts, strict=True)
    ]


def test_processes_that_are_told_different_things_say_so(tmp_path):
    job = Job(2, tmp_path, "-m", "experiments.genneg.checkerboard", "--preset", "smoke", last=("--points", "900"))
    expected = "the configuration must be equal on all 2 processes, got another on process 1"
    assert failed(job) == [expected, expected]


def test_an_option_that_one_process_cannot_read_ends_all(tmp_path):
    job = Job(2, tmp_path, "-m", "experiments.genneg.checkerboard", "--preset", "smoke", last=("--pionts", "900"))
    assert failed(job)[0] == "process 1: exit with status 2"
    assert "Unrecognized options: --pionts" in job.log(1).read_text()


def test_a_full_disk_of_one_host_is_an_error_of_all(tmp_path):
    said, other = failed(Job(2, tmp_path, str(WORKER), str(tmp_path), "train", FULL="1"))[::-1]
    assert "could not be written (OSError: [Errno 28] free space must be >= " in said
    assert "could not be written (Elsewhere: process 1: [Errno 28] free space must be >= " in other


def test_a_checkpoint_of_a_later_format_is_an_error_of_all(undisturbed, tmp_path):
    shutil.copytree(undisturbed("train"), tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "steps" / "60" / "_CHECKPOINT_METADATA"
    stored = json.loads(newest.read_text())
    assert stored["custom_metadata"]["format"] == 2
    stored["custom_metadata"]["format"] = 3
    newest.write_text(json.dumps(stored))
    for text in failed(Job(2, tmp_path, str(WORKER), str(tmp_path), "train")):
        assert text.endswith("60: format must be <= 2, got 3: read it with a later gendiff")


@pytest.mark.parametrize("killed", [2, 0])
def test_a_killed_process_ends_the_job_and_others_go_on_from_there(killed, undisturbed, tmp_path):
    reference = read(undisturbed("train"), "train")
    folder = tmp_path / "killed"
    folder.mkdir()
    job = Job(4, folder, str(WORKER), str(folder), "train", PAUSE="0.3")
    job.wait_for("step 16")
    job.processes[killed].kill()
    start = time.monotonic()
    statuses = job.wait(60)
    assert time.monotonic() - start < 60
    assert statuses[killed] == -signal.SIGKILL
    assert all(status in (70, -signal.SIGABRT) for status in statuses[:killed] + statuses[killed + 1 :])
    texts = [job.log(index).read_text() for index in range(4) if index != killed]
    assert re.search("lost|died|UNAVAILABLE", texts[0])
    # Gloo aborts where a peer goes in the middle of an operation.
    assert all(re.search("lost|died|UNAVAILABLE|gloo::", text) for text in texts)
    resumed = finished(2, folder, "train")
    assert "step 4\n" not in job.log(0).read_text(), "it went on, and did not begin again"
    for name, value in reference.items():
        np.testing.assert_allclose(resumed[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("processes", "mode"), [(1, "train"), (2, "train"), (2, "sharded"), (2, "streamed")])
def test_a_notice_stores_everything_and_says_so(processes, mode, undisturbed, tmp_path):
    reference = read(undisturbed(mode), mode)
    folder = tmp_path / "stopped"
    folder.mkdir()
    job = Job(processes, folder, str(WORKER), str(folder), mode, PAUSE="0.3")
    job.wait_for("step 8")
    job.processes[-1].send_signal(signal.SIGTERM)
    assert job.wait(60) == [75] * processes
    text = job.log(0).read_text()
    assert "stopped by a notice (SIGTERM): step " in text
    resumed = finished(processes if mode == "train" else 1, folder, mode)
    assert "step 4\n" not in job.log(0).read_text(), "it went on, and did not begin again"
    for name, value in reference.items():
        np.testing.assert_allclose(resumed[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_slurm_tells_who_is_there(tmp_path):
    said = "from gendiff import distributed as d; d.start(); print(d.name(), d.first(lambda: 'hello'), flush=True)"
    slurm = {
        "SLURM_JOB_ID": str(free_port()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", said],
            env=environment(**slurm, SLURM_PROCID=str(index), SLURM_LOCALID=str(index)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for index, process in enumerate(processes):
        text, _ = process.communicate(timeout=120)
        assert text.strip().splitlines()[-1] == f"[process {index} of 2, {socket.gethostname()}]  hello"


def test_others_that_do_not_come_are_an_error(tmp_path):
    variables = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    env = environment(**variables, GENDIFF_START_SECONDS="2")
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path), "train"], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        f"error: {variables['JAX_COORDINATOR_ADDRESS']}: all 2 processes of the run must join within 2 s, got fewer: "
        "start every process, with an address that it can reach"
    )


def figures(path: Path) -> dict[tuple[str, str], float]:
    """Row and metric -> value, without metrics of a clock."""
    rows = json.loads((path / "results.json").read_text())["rows"]
    return {
        (row["name"], name): estimate["value"]
        for row in rows
        for name, estimate in row["metrics"].items()
        if "seconds" not in name
    }


JUMPS = {"heading_distance": 180.0, "gap_distance": 100.0}
"""What a vehicle may change of these by the last bit of its place, where the edge of the road or the vehicle ahead that
is nearest becomes another one: degrees, metres."""
VEHICLES = 64 * 4
"""At least, in the traffic scenes of a row."""


def tolerance(row: str, name: str, wanted: dict[tuple[str, str], float]) -> float:
    """How far a figure may be from that of other processes: sums of floats in another order, and two jumps."""
    allowed = 1e-5 + 1e-4 * abs(wanted[row, name]) + 2 * JUMPS.get(name, 0.0) / VEHICLES
    if name.endswith("_gain"):  # a difference, of which both sides are rounded
        sides = [abs(value) for (_, other), value in wanted.items() if other == name.removesuffix("_gain")]
        allowed += 1e-6 * max(sides, default=0.0)
    return allowed


def same_figures(expected: Path, other: Path) -> None:
    wanted, found = figures(expected), figures(other)
    assert wanted.keys() == found.keys()
    assert len(wanted) > 20
    others = {
        name: (value, found[name])
        for name, value in wanted.items()
        if not abs(found[name] - value) <= tolerance(*name, wanted)
    }
    assert others == {}


def experiment(processes: int, folder: Path, logs: Path, module: str, *arguments: str) -> Job:
    logs.mkdir()
    return Job(processes, logs, "-m", module, *arguments, "--preset", "smoke", "--output", str(folder))


@pytest.mark.slow
def test_a_table_is_the_same_after_a_kill_and_on_other_numbers_of_processes(tmp_path):
    module, reference, folder = "experiments.genneg.checkerboard", tmp_path / "whole", tmp_path / "killed"
    job = experiment(1, reference, tmp_path / "logs-1", module)
    assert job.wait(600) == [0], job.log(0).read_text()[-3000:]

    def reported(text: str, job: Job) -> None:
        end = time.monotonic() + 400
        while not (folder / "metrics.jsonl").exists() or text not in (folder / "metrics.jsonl").read_text():
            assert time.monotonic() < end
            assert all(process.poll() is None for process in job.processes), job.log(0).read_text()[-3000:]
            time.sleep(0.1)

    job = experiment(4, folder, tmp_path / "logs-2", module)
    reported('"phase": "round-1/classifier"', job)
    job.processes[2].kill()
    statuses = job.wait(60)
    assert statuses[2] == -signal.SIGKILL
    assert 0 not in statuses
    job = experiment(2, folder, tmp_path / "logs-3", module)
    reported('"phase": "distilled-1"', job)
    job.processes[1].kill()
    assert 0 not in job.wait(60)
    job = experiment(4, folder, tmp_path / "logs-4", module)
    assert job.wait(900) == [0] * 4, job.log(0).read_text()[-3000:]
    same_figures(reference, folder)


def test_a_run_of_a_sweep_that_fails_on_one_process_ends_all(tmp_path):
    folder = tmp_path / "sweep"
    (folder / "seed-0").mkdir(parents=True)
    (folder / "seed-0" / "config.json").write_text('{"experiment": "other", "format": 2}')
    job = experiment(
        2, folder, tmp_path / "logs", "experiments.sweep", "genneg.checkerboard", "--seeds", "0:2", "--at-once", "1"
    )
    said, other = failed(job)
    assert "seed-0 holds another configuration (" in said
    assert other.startswith("process 0: ")


@pytest.mark.slow
def test_a_sweep_of_two_processes_is_that_of_one(tmp_path):
    grid = ("genneg.checkerboard", "--seeds", "0:2")
    for processes in (1, 2):
        job = experiment(
            processes, tmp_path / str(processes), tmp_path / f"logs-{processes}", "experiments.sweep", *grid
        )
        assert job.wait(900) == [0] * processes, job.log(0).read_text()[-3000:]
    for seed in (0, 1):
        same_figures(*(tmp_path / str(processes) / f"seed-{seed}" for processes in (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("module", ["censoring.mnist", "genneg.traffic", "relative_reward.maze2d"])
def test_a_table_of_two_processes_is_that_of_one(module, tmp_path):
    folders = {processes: tmp_path / f"of-{processes}" for processes in (1, 2)}
    for processes, folder in folders.items():
        job = experiment(processes, folder, tmp_path / f"logs-{processes}", f"experiments.{module}")
        assert job.wait(1800) == [0] * processes, job.log(0).read_text()[-3000:]
    same_figures(*folders.values())
