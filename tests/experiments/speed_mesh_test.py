"""The table of the mesh's cost: both sides are the same training.  Speed is no test."""

import numpy as np
import pytest

from experiments.speed import mesh


@pytest.mark.parametrize("name", ["checkerboard", "traffic"])
def test_both_sides_are_the_same_training(name):
    both = mesh.sides(mesh.TRAININGS[name]("smoke"))
    losses = {side: [go_on(steps) for steps in (1, 3, 2)] for side, go_on in both.items()}
    np.testing.assert_allclose(losses["mesh"], losses["plain"], rtol=1e-5)
    assert len(set(losses["plain"])) == 3, "the state moves"
