"""The table of what steps wait for: its data are read back whole, and the two trainings are one.  Speed is no test."""

from itertools import repeat

import numpy as np
import pytest

from experiments.speed import input as speed_input


@pytest.mark.parametrize(("name", "shape"), [("digits", (28, 28, 1)), ("motions", (256, 263))])
def test_data_are_read_back(name, shape, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    source = speed_input.stored(str(tmp_path), name, 100)
    assert len(source) == 100
    every = np.stack([source[i]["x"] for i in range(100)]).astype(np.float64)
    assert every.shape == (100, *shape)
    # What was written: uniform bytes, or standard normal numbers.
    mean, std = (127.5, np.sqrt((256**2 - 1) / 12)) if name == "digits" else (0.0, 1.0)
    error = std / np.sqrt(every.size)
    assert abs(every.mean() - mean) < 5 * error
    assert abs(every.std() - std) < 5 * error


def test_a_step_is_that_of_training(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    fed = speed_input.of_motions(speed_input.PRESETS["smoke"], str(tmp_path))
    batch = np.stack([fed.change(fed.source[i]) for i in range(fed.batch)])
    timed = speed_input.Timed(repeat(batch))
    (seconds, loss), (_, again) = (speed_input.trained(fed, batches, 3) for batches in (timed, repeat(batch)))
    assert seconds > 0
    assert loss == again
    assert 0 < loss < 10
    assert len(timed.seconds) == 6
