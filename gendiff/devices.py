"""The places of a training's arrays: its mesh, and the arrays that are split over it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from gendiff import check, distributed, potential


class Placement(NamedTuple):
    """Chosen once by `training.train`, and static in its compiled programs.

    The state of one run is replicated or split (FSDP), and its batch is split over `data`.  K runs have a leading axis
    K, which is split over `replica`; the devices on `data` share the batches of their runs.
    """

    mesh: jax.sharding.Mesh
    runs: bool = False
    """Arrays have a leading axis of runs."""
    own: tuple[bool, ...] = ()
    """Leaves of the context that have that axis, in the order of `jax.tree.leaves`."""
    fully_sharded: bool = False
    """A device holds a part of the state."""

    @property
    def sharers(self) -> int:
        """Number of devices that share a batch."""
        return self.mesh.shape["data"]

    def of_state(self, state: Any) -> Any:
        """The shardings of a state's arrays."""
        if self.fully_sharded:
            return distributed.fully_sharded(self.mesh, state)
        place = over_replicas(self.mesh) if self.runs else distributed.replicated(self.mesh)
        return jax.tree.map(lambda _: place, state)

    def divide(self, context: Any) -> tuple[list, list]:
        """The context's arrays that a run owns, and the shared ones; `join` is the inverse."""
        leaves = jax.tree.leaves(context)
        flags = self.own or (False,) * len(leaves)
        pairs = list(zip(leaves, flags, strict=True))
        return [leaf for leaf, own in pairs if own], [leaf for leaf, own in pairs if not own]

    def join(self, structure: Any, own: Iterable, shared: Iterable) -> Any:
        """The context of a structure (`jax.tree.structure`) from its own and shared arrays."""
        own, shared = iter(own), iter(shared)
        flags = self.own or (False,) * structure.num_leaves
        return jax.tree.unflatten(structure, [next(own if flag else shared) for flag in flags])

    def put_context(self, context: Any) -> Any:
        """Copy a context to the devices."""
        own, shared = self.divide(context)
        return self.join(jax.tree.structure(context), spread(self.mesh, own), distributed.replicate(self.mesh, shared))

    def over_runs(self, function: Callable[[Any, Any], Any], rows: Any, context: Any) -> Any:
        """Inside `jit`: `function(rows of a run, context of a run)`, for all runs on their devices."""
        own, shared = self.divide(context)

        def on_device(runs: tuple, shared: list) -> Any:
            of_run = lambda run: function(run[0], self.join(jax.tree.structure(context), run[1], shared))
            return potential.over_members(of_run, runs)

        axis = jax.P("replica")
        mapped = jax.shard_map(on_device, mesh=self.mesh, in_specs=(axis, jax.P()), out_specs=axis, check_vma=False)
        return mapped((rows, own), shared)


def over_replicas(mesh: jax.sharding.Mesh) -> jax.NamedSharding:
    """Sharding of arrays with a row a run: axis 0 over the mesh's axis `replica`."""
    return jax.NamedSharding(mesh, jax.P("replica"))


def runs_mesh(
    devices: list[jax.Device] | None = None, runs: int | None = None, batch: int | None = None
) -> jax.sharding.Mesh:
    """A mesh for K runs, with as many devices on the axis `replica` as the runs keep busy.

    The other accelerators go to `data`: 5 runs on 16 devices are all on every device, with a 16th of a batch; 6 runs on
    4 devices are 3 a pair of devices, with half a batch a device.

    Args:
      devices: default: all.
      runs: K; None: all devices go to `replica`.
      batch: examples of a step of a run, which `data` must divide; None: all devices go to `replica`.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if runs is None or batch is None or devices[0].platform == "cpu":
        return distributed.make_mesh(devices, count)
    able = [rows for rows in range(1, count + 1) if count % rows == 0 and batch % (count // rows) == 0]
    # The least work of a device; of equal work, the fewest all-reduces.
    return distributed.make_mesh(devices, min(able, key=lambda rows: (-(-runs // rows) * rows, -rows)))


def padded_runs(mesh: jax.sharding.Mesh, runs: int) -> int:
    """`runs` rounded up to a multiple of the length of `replica`."""
    return -(-runs // mesh.shape["replica"]) * mesh.shape["replica"]


def spread(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Copy arrays with a row a run, split over `replica`; copies of the last run pad them."""
    if not jax.tree.leaves(tree):
        return tree
    runs = check.rows("devices: runs", tree)
    rows = np.minimum(np.arange(padded_runs(mesh, runs)), runs - 1)
    return distributed.put(jax.tree.map(lambda a: a[rows], tree), over_replicas(mesh))
