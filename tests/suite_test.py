"""The suite itself: a run whose workers die fails."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_run_whose_workers_die_fails():
    """XLA ends a process for an unknown flag, here while pytest collects the tests."""
    command = [sys.executable, "-m", "pytest", "-n", "1", "--max-worker-restart", "0", "-p", "no:cacheprovider"]
    environment = os.environ | {"XLA_FLAGS": "--xla_no_such_flag=1"}
    done = subprocess.run(
        [*command, "tests/check_test.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stdout
    assert "a test process died" in done.stdout
