"""What is published of each TPU, and how a slice is named."""

import math
import re
from dataclasses import dataclass

from step_grpo.errors import UserError
from step_grpo.mesh import largest_tensor

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of TPU.

    All figures but `hbm` are Google's, from https://docs.cloud.google.com/tpu/docs/v5e and tpu7x (which has
    v5p and v6e too). `hbm` is what the compiler says a program may use ("exceeds available HBM"), a little
    less than what is built in.

    Attributes:
        kind: JAX's name of its devices.
        devices: that JAX sees of one chip.
        hbm: bytes of one device.
        flops: bfloat16 FLOP/s of one chip at its peak.
        hbm_bandwidth: bytes/s of one chip.
        ici_bandwidth: bytes/s of all links of one chip, both directions together.
        slices: chips along each axis, the smallest slices first, of those that are handed out.
    """

    kind: str
    devices: int
    hbm: float
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    slices: tuple[str, ...]


SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SLICES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
CHIPS = {
    "v5e": Chip("TPU v5 lite", 1, 15.75 * GIB, 197e12, 819e9, 400e9, SLICES_2D),
    "v5p": Chip("TPU v5", 1, 95.74 * GIB, 459e12, 2765e9, 1200e9, SLICES_3D),
    "v6e": Chip("TPU v6 lite", 1, 31.25 * GIB, 918e12, 1638e9, 800e9, SLICES_2D),
    "tpu7x": Chip("TPU7x", 2, 94.75 * GIB, 2307e12, 7380e9, 1200e9, ("1x1x1", *SLICES_3D)),
}


def chip_of(topology: str) -> Chip:
    """The chip of a slice such as `v5p:2x2x4`.

    Raises:
        UserError: naming the chips, or how a slice is written.
    """
    kind, colon, shape = topology.partition(":")
    if kind not in CHIPS:
        raise UserError(f"--topology={topology}: unknown chip {kind!r}; there are {', '.join(CHIPS)}")
    axes = len(CHIPS[kind].slices[-1].split("x"))
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != axes - 1:
        raise UserError(
            f"--topology={topology}: a slice of {kind} is written as its chips along {axes} axes, such as "
            f"{kind}:{CHIPS[kind].slices[2]}"
        )
    return CHIPS[kind]


def tensor_limit(topology: str) -> float:
    """The largest `config.mesh.tensor` that compiles for a slice, as far as its kind and size say."""
    return largest_tensor(CHIPS[topology.partition(":")[0]].kind, chip_count(topology))


def chip_count(topology: str) -> int:
    """Chips of a slice."""
    return math.prod(int(size) for size in topology.partition(":")[2].split("x"))
