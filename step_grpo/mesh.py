"""The device mesh: rows of a batch and lanes of a rollout over the `data` axis, weights on every device."""

import math
import os

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def use_all_cores() -> None:
    """Makes each core a device where JAX runs on the CPU; call before anything of JAX runs.

    XLA spreads one program poorly over cores, but runs the programs of several devices side by side. A
    device count that the user has set stays.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))


def make_mesh(*shared: int) -> Mesh:
    """As many devices as divide every number in `shared` (rows, lanes), along one axis, `data`."""
    count = math.gcd(jax.device_count(), *shared)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def over_data(mesh: Mesh) -> NamedSharding:
    """The leading axis spread over the devices; its size must be a multiple of their number."""
    return NamedSharding(mesh, PartitionSpec("data"))
