"""The device mesh, and what of an array lies where on it.

Three axes: `data` copies the weights and spreads the rows, `fsdp` spreads both, `tensor` spreads the heads,
the feed-forward and the vocabulary of one row. Rows of a batch and lanes of a rollout lie over `data` and
`fsdp` together. `RULES` says which logical axis of an array is spread over which of them; whatever it does
not name is whole on every device.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from step_grpo.errors import UserError

AXES = ("data", "fsdp", "tensor")
RULES: Mapping[str | None, str | tuple[str, ...]] = MappingProxyType(
    {
        "rows": ("data", "fsdp"),
        "copies": "data",  # rows where another axis is spread over `fsdp`
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "ffn": "tensor",
        "vocab": "tensor",
    }
)
"""Logical axis of an array to axes of the mesh."""
TENSOR_LIMITS = MappingProxyType({"TPU v5 lite": ((16, 1), (8, 2)), "TPU v6 lite": ((8, 2),)})
"""By kind: chips of a slice, above which the compiler takes no rollout over more devices than so many."""


def use_all_cores() -> None:
    """Makes each core a device where JAX runs on the CPU; call before anything of JAX runs.

    XLA spreads one program poorly over cores, but runs the programs of several devices side by side. A
    device count that the user has set stays.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def make_mesh(
    *shared: int,
    data: int = 0,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of given sizes, one of which may be 0: whatever the other two leave.

    That one is the largest for which `data * fsdp` divides every number in `shared`; devices that do not
    fit in are left out, unless several hosts share the mesh.

    Args:
        *shared: numbers of rows and lanes that `data` and `fsdp` share among them; 0 for any.
        data: size of the axis, as are the next two.
        fsdp: 0 for what is left.
        tensor: 0 for what is left.
        devices: all there are, or those of a topology that is not here.

    Raises:
        UserError: the sizes do not fit the devices or the numbers.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(len(devices), {"data": data, "fsdp": fsdp, "tensor": tensor}, math.gcd(*shared))
    count = math.prod(sizes)
    if count < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"config.mesh of {sizes} uses {count} of {len(devices)} devices; hosts can only be used whole"
        )
    return Mesh(arranged(sizes, list(devices)[:count]), AXES, axis_types=(AxisType.Auto,) * 3)


def arranged(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Devices as an array of given sizes, the last axis within hosts where that can be.

    Axes follow the torus that the chips form where it has axes of these sizes; but what shares a lane must
    lie on one host, and where the torus would not have it so, or fits no axis, devices go host by host.
    """
    by_host = np.array(sorted(devices, key=lambda d: (d.process_index, d.id))).reshape(sizes)
    try:
        grid = jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices).devices
    except NotImplementedError:  # no axes of the torus have these sizes
        return by_host
    hosts = [{device.process_index for device in group} for group in grid.reshape(-1, sizes[-1])]
    return by_host if any(len(of_group) > 1 for of_group in hosts) else grid


def mesh_of(config: ConfigDict, *shared: int) -> Mesh:
    """The mesh that the `mesh` part of a config asks for; `shared` and errors as of `make_mesh`."""
    return make_mesh(*shared, data=config.data, fsdp=config.fsdp, tensor=config.tensor)


def mesh_sizes(devices: int, wanted: Mapping[str, int], shared: int) -> tuple[int, ...]:
    """The sizes of the three axes; see `make_mesh`.

    Raises:
        UserError: there are too few devices, or rows or lanes do not spread over them.
    """
    sizes = {axis: wanted[axis] for axis in AXES}
    open_axes = [axis for axis, size in sizes.items() if not size]
    fixed = math.prod(size for size in sizes.values() if size)
    if len(open_axes) > 1:
        raise UserError(f"config.mesh.{' and config.mesh.'.join(open_axes)} are 0; one of them may be")
    if fixed > devices:
        raise UserError(f"config.mesh of {tuple(sizes.values())} needs {fixed} devices; there are {devices}")

    def spreads(size: int) -> bool:
        filled = {**sizes, **dict.fromkeys(open_axes, size)}
        return shared % (filled["data"] * filled["fsdp"]) == 0

    most = devices // fixed if open_axes else 1
    fitting = [size for size in range(1, most + 1) if spreads(size)]
    if not fitting:
        raise UserError(
            f"config.mesh: data x fsdp of {tuple(sizes.values())} must divide config.rollout.lanes and the "
            "rows trained on at a time (config.grpo.rows, or `rows` of config.imitation or "
            f"config.verifier_training), whose common divisor is {shared}"
        )
    return tuple(size or fitting[-1] for size in sizes.values())


def share_of(mesh: Mesh, process: int) -> Mesh:
    """The devices of one process, as a mesh (`data`, `tensor`) of their own: what a rollout runs on.

    Its `data` is all of a process's `data` and `fsdp`: while sampling, nothing passes between lanes, so every
    process works for itself.

    Raises:
        UserError: weights are spread over devices of several processes, or over several devices on a slice
            for which that does not compile.
    """
    check_tensor(list(mesh.devices.flat), mesh.shape["tensor"])
    groups = mesh.devices.reshape(-1, mesh.shape["tensor"])
    owners = [{device.process_index for device in group} for group in groups]
    if any(process in owner and len(owner) > 1 for owner in owners):
        raise UserError(
            f"config.mesh.tensor is {mesh.shape['tensor']}, more than the devices of a host; the rollout "
            "needs each copy of the weights on one host"
        )
    mine = np.array([group for group, owner in zip(groups, owners, strict=True) if owner == {process}])
    return Mesh(mine, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def check_tensor(devices: Sequence[Any], tensor: int) -> None:
    """Refuses a slice for which a rollout with weights over several devices does not compile.

    Args:
        devices: all of the run.
        tensor: those that the weights of a rollout lie over.

    Raises:
        UserError: naming `config.mesh.tensor`.
    """
    size = max(Counter(getattr(device, "slice_index", 0) for device in devices).values())
    kind = devices[0].device_kind
    if tensor > (most := largest_tensor(kind, size)):
        raise UserError(
            f"config.mesh.tensor is {tensor}, which does not compile for a slice of {size} chips of {kind} "
            f"(limited ICI routing between hosts); set config.mesh.tensor={most:.0f}, or take a smaller "
            "slice or v5p"
        )


def largest_tensor(kind: str, chips: int) -> float:
    """The largest `config.mesh.tensor` whose rollout compiles, as far as kind and size of a slice say.

    Args:
        kind: JAX's name of the devices.
        chips: of the slice.
    """
    return next((most for above, most in TENSOR_LIMITS.get(kind, ()) if chips > above), math.inf)


def seen_from(mesh: Mesh, array: jax.Array) -> jax.Array:
    """An array on a larger mesh as one on a part of it (`share_of`), which must hold all of it; no copy."""
    held = {shard.device: shard.data for shard in array.addressable_shards}
    assert isinstance(array.sharding, NamedSharding)
    where = NamedSharding(mesh, array.sharding.spec)
    return jax.make_array_from_single_device_arrays(
        array.shape, where, [held[device] for device in mesh.devices.flat]
    )


def place_rows(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Host arrays, the same in every process, on the devices; each process fills its own.

    Args:
        mesh: with some of `AXES`.
        tree: of arrays.
        axis: of their rows.
    """
    where = over_data(mesh, axis)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, where, lambda part: x[part]), tree)


def row_shares(mesh: Mesh) -> int:
    """Parts that the rows are spread over."""
    return axis_size(mesh, "data") * axis_size(mesh, "fsdp")


def axis_size(mesh: Mesh, axis: str) -> int:
    """Devices along an axis; 1 where the mesh does not have it."""
    return mesh.shape.get(axis, 1)


# ---------------------------------------------------------------------- where arrays lie


def spec_of(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> PartitionSpec:
    """Where the logical axes of an array lie on a mesh.

    Args:
        mesh: with some of `AXES`.
        axes: logical names, as in `RULES`.
        shape: of the array, to be checked.

    Raises:
        UserError: a size is no multiple of the devices that its axis is spread over.
    """
    spec: list[Any] = []
    for i, name in enumerate(axes):
        rule = RULES.get(name, ())
        over = tuple(a for a in ((rule,) if isinstance(rule, str) else rule) if axis_size(mesh, a) > 1)
        count = math.prod(mesh.shape[a] for a in over)
        if shape is not None and shape[i] % count:
            raise UserError(
                f"config.mesh.{over[-1]}: the model's {name} axis of {shape[i]} does not spread over {count} "
                "devices; use a divisor of it"
            )
        spec.append(over[0] if len(over) == 1 else over or None)
    while spec and spec[-1] is None:  # as the compiler writes them: equal places compare equal
        spec.pop()
    return PartitionSpec(*spec)


def is_axes(tree: Any) -> bool:
    """Whether it names the logical axes of one array."""
    return isinstance(tree, tuple) and all(name is None or isinstance(name, str) for name in tree)


def shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """The sharding of every array of a tree.

    Args:
        mesh: with some of `AXES`.
        axes: tree of tuples of logical names.
        shapes: the same tree of arrays, or of what has their shapes.

    Raises:
        UserError: as `spec_of`.
    """
    names, structure = jax.tree.flatten(axes, is_leaf=is_axes)
    specs = [spec_of(mesh, n, x.shape) for n, x in zip(names, jax.tree.leaves(shapes), strict=True)]
    return jax.tree.unflatten(structure, [NamedSharding(mesh, spec) for spec in specs])


def constrain(mesh: Mesh | None, array: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler where an array lies; without a mesh, or on a single device, nothing."""
    if mesh is None or mesh.size == 1:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec_of(mesh, axes)))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """One axis, rows or lanes, spread over `data` and `fsdp`; a multiple of the devices there."""
    return NamedSharding(mesh, spec_of(mesh, [*[None] * axis, "rows"]))
