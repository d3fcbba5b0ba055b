import json

import jax
import numpy as np
import pytest

from gendiff import training
from gendiff.checkpoint import Checkpoints
from gendiff.data import stream
from gendiff.training import Host, Settings, Task

SOURCE = np.arange(50.0, dtype=np.float32).reshape(25, 2)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_batches_do_not_depend_on_the_number_of_processes(processes):
    whole = take(stream.batches(SOURCE, 6, 1, processes=1), 15)
    parts = [take(stream.batches(SOURCE, 6, 1, process=p, processes=processes), 15) for p in range(processes)]
    for i, batch in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), batch)


def test_every_epoch_has_each_element_once_in_another_order():
    rows = np.concatenate(take(stream.batches(SOURCE, 5, 1), 10))[:, 0]
    first, second = rows[:25], rows[25:]
    np.testing.assert_array_equal(np.sort(first), SOURCE[:, 0])
    np.testing.assert_array_equal(np.sort(second), SOURCE[:, 0])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.concatenate(take(stream.batches(SOURCE, 5, 2), 5))[:, 0])


def test_a_position_is_plain_data_and_goes_on_with_the_next_batch():
    one = stream.batches(SOURCE, 6, 1)
    take(one, 4)
    position = json.loads(json.dumps(one.get_state()))
    expected = take(one, 3)
    other = stream.batches(SOURCE, 6, 1)
    other.set_state(position)
    np.testing.assert_array_equal(take(other, 3), expected)
    # On another number of processes.
    parts = []
    for p in range(2):
        part = stream.batches(SOURCE, 6, 1, process=p, processes=2)
        part.set_state(position)
        parts.append(np.stack(take(part, 3)))
    np.testing.assert_array_equal(np.concatenate(parts, 1), expected)


def test_elements_are_changed():
    changed = next(stream.batches(SOURCE, 5, 1, lambda x: {"sum": x.sum()}))
    np.testing.assert_array_equal(changed["sum"], next(stream.batches(SOURCE, 5, 1)).sum(1))


def test_a_training_resumes_at_the_batch_where_it_stopped(tmp_path):
    task = lambda context: Task(lambda w, key, x: (w - x.sum()) ** 2)

    def train(report=lambda step, metrics: None, checkpoints=None):
        host = Host(None, checkpoints, report)
        data = stream.batches(SOURCE, 8, 3)
        return training.train(jax.random.key(0), np.float32(0.0), task, (), Settings(12, 0.1, every=4), host, data).last

    class Stopped(Exception):
        pass

    def stop(step, metrics):
        if step == 8:
            raise Stopped

    with pytest.raises(Stopped):
        train(stop, Checkpoints(tmp_path))
    np.testing.assert_array_equal(train(checkpoints=Checkpoints(tmp_path)), train())


@pytest.mark.parametrize(
    ("source", "size", "message"),
    [
        ([], 4, "elements of the source must be >= 1, got 0"),
        (SOURCE, 5, "size must be a multiple of the 2 processes, got 5"),
        (SOURCE, 0, "size must be >= 1 and whole, got 0"),
    ],
)
def test_bad_input_is_named(source, size, message):
    with pytest.raises(ValueError, match=message):
        stream.batches(source, size, 0, process=0, processes=2)
