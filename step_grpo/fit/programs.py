"""The programs of a run, lowered from shapes alone over the devices of a slice that need not be here.

A run of `main` goes through two stages, and each holds other arrays beside those of its programs: the rollout
(the training state and the reference stay where they are, the weights that the decode loop reads come beside
them, and the caches), and the update (gradients and the packed batches instead). `STAGES` says which program
has which arrays beside it.
"""

import math
import re
import zlib
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from step_grpo.errors import UserError
from step_grpo.evaluate import decode_shardings
from step_grpo.fit.architectures import architecture_of
from step_grpo.fit.chips import chip_count, chip_of
from step_grpo.grpo.loss import LossSums
from step_grpo.grpo.packing import PackedBatch, Sample, pack
from step_grpo.grpo.update import TrainBatch, TrainState, moments_beside
from step_grpo.main import build_update, optimizer_of
from step_grpo.mesh import axis_size, make_mesh, over_data, replicated, row_shares, shardings, share_of
from step_grpo.model import lora, qwen
from step_grpo.model.attention import choose_attention
from step_grpo.model.linear import axes_of
from step_grpo.model.load import Description
from step_grpo.rollout.engine import RolloutEngine, build_machine, lane_bytes, lanes_that_fit
from step_grpo.rollout.policies import build_policy
from step_grpo.rollout.programs import Programs, Shape
from step_grpo.rollout.triggers import TriggerTable, Vocabulary, build_vocabulary

ROLLOUT = ("weights", "prefill", "insert", "segment", "grow")
UPDATE = ("log-probs", "accumulate", "apply")

STAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "weights": ("embeddings", "moments", "reference", "decode weights", "tables"),
        "prefill": ("base", "params", "moments", "reference", "tables", "cache"),
        "insert": ("base", "params", "moments", "reference", "decode weights", "tables"),
        "segment": ("base", "params", "moments", "reference", "prompts"),
        "grow": ("base", "params", "moments", "reference", "decode weights", "tables", "prompts"),
        "log-probs": ("moments", "reference", "tables", "other batches"),
        "accumulate": ("moments", "reference", "tables", "other batches"),
        "apply": ("base", "reference", "tables", "batches"),
    }
)
"""Which arrays of the run lie beside the arguments of each program."""


class Sizes(NamedTuple):
    """What a run holds, in bytes of one device, and how it is spread.

    Attributes:
        held: the arrays of `STAGES`; those of the lanes are of a single lane.
        numbers: of the model's weights.
        groups: parts of the mesh with lanes of their own; each has its own copy of the decode weights.
        groups_here: those of one host.
        row_shares: parts of the mesh that the rows of a micro-batch are spread over.
        mesh: devices along data, fsdp and tensor.
        wanted: completions of a step for each group.
        grows: the cache starts smaller than it may become.
    """

    held: dict[str, int]
    numbers: int
    groups: int
    groups_here: int
    row_shares: int
    mesh: tuple[int, int, int]
    wanted: int
    grows: bool


def topology_devices(topology: str) -> list[Any]:
    """The devices of a slice that is not here.

    Raises:
        UserError: there is no such slice.
    """
    alone = {"chips_per_host_bounds": (1, 1, 1)} if chip_count(topology) == 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone).devices)
    except Exception as error:  # libtpu raises several types for a wrong name
        raise UserError(f"--topology={topology}: libtpu knows no such slice ({error})") from error


class Run:
    """One run on one set of devices."""

    def __init__(self, config: ConfigDict, devices: list[Any], lanes: int, rows: int):
        """Nothing is lowered yet.

        Args:
            config: the run's, validated.
            devices: of the slice.
            lanes: of one group of devices; 0 where no program of the rollout is asked for.
            rows: of a micro-batch, over all devices.
        """
        self.config, self.lanes, self.rows = config, lanes, rows
        self.mesh = make_mesh(config.rollout.lanes, config.grpo.rows, devices=devices, **config.mesh)
        self.sampling = share_of(self.mesh, self.mesh.devices.flat[0].process_index)
        self.cfg = qwen.config_from_hf(architecture_of(config.model))
        self.dtype = jnp.dtype(config.model.dtype)

    # ------------------------------------------------------------------ arrays

    @cached_property
    def loaded(self) -> qwen.Params:
        """The weights as they are kept once they are read from the files."""
        keep, axes = lora.keeper(self.config), qwen.logical_axes(self.cfg)

        def keep_all(params: qwen.Params) -> qwen.Params:
            layers = {name: keep(name, weight) for name, weight in params["layers"].items()}
            rest = {name: keep(name, weight) for name, weight in params.items() if name != "layers"}
            return {**rest, "layers": layers}

        shapes = jax.eval_shape(keep_all, qwen.abstract_params(self.cfg))
        layers = {name: axes_of(axes["layers"][name], weight) for name, weight in shapes["layers"].items()}
        rest = {name: axes_of(axes[name], weight) for name, weight in shapes.items() if name != "layers"}
        return placed(shapes, shardings(self.mesh, {**rest, "layers": layers}, shapes))

    @cached_property
    def params(self) -> qwen.Params:
        """What is trained: the master weights, or an adapter beside them."""
        settings = self.config.lora
        if not settings.rank:
            return self.loaded
        targets = tuple(settings.targets)
        adapter = jax.eval_shape(lambda: lora.init_adapter(self.cfg, settings.rank, targets, 0))
        return placed(adapter, shardings(self.mesh, lora.adapter_axes(self.cfg, targets), adapter))

    @property
    def base(self) -> qwen.Params | None:
        """The frozen weights beside an adapter."""
        return self.loaded if self.config.lora.rank else None

    @property
    def whole(self) -> qwen.Params:
        """The policy: weights, perhaps with an adapter beside them."""
        return lora.attacher(self.config.lora)(self.params, self.base)

    @property
    def first(self) -> qwen.Params:
        """What training began with: the reference, in the type of the compute, or a fresh adapter."""
        if self.config.lora.rank:
            return self.params
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, self.dtype, sharding=x.sharding), self.params
        )

    @cached_property
    def state(self) -> TrainState:
        """What an update changes."""
        optimizer = optimizer_of(self.config.grpo)
        shapes = jax.eval_shape(optimizer.init, self.params)
        opt_state = placed(shapes, moments_beside(optimizer, shapes, self.params))
        step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(self.mesh))
        return TrainState(step, self.params, opt_state)

    def decode_weights(self, mesh: Mesh) -> qwen.Params:
        """The weights as the rollout reads them, over the whole mesh or over that of a host."""
        shapes = jax.eval_shape(partial(qwen.decode_params, dtype=self.dtype), self.whole)
        return placed(shapes, decode_shardings(self.whole, self.cfg, self.config.model.dtype, mesh))

    @property
    def packed(self) -> PackedBatch:
        """The micro-batches of an update."""
        completions = self.config.grpo.prompts_per_update * self.config.rollout.samples
        shape = (math.ceil(completions / self.rows), self.rows, self.config.grpo.row_length)
        where = over_data(self.mesh, axis=1)
        return PackedBatch(*(jax.ShapeDtypeStruct(shape, x.dtype, sharding=where) for x in smallest_batch()))

    @property
    def batch(self) -> TrainBatch:
        """The micro-batches of an update with the log-probs of both policies."""
        logprobs = self.packed.advantages
        return TrainBatch(self.packed, logprobs, logprobs)

    # ------------------------------------------------------------------ rollout

    @cached_property
    def engine(self) -> RolloutEngine:
        """The engine of the run, with a stand-in for its tokenizer."""
        config, tokenizer = self.config.rollout, StandIn()
        if config.exit == "verifier":
            raise UserError(
                "config.rollout.exit is 'verifier', whose second model this check does not know; check with "
                "'confidence', and leave room for the weights and the cache of the verifier"
            )
        described = Description(self.cfg, {}, {}, (0, 1), tokenizer)
        policy = build_policy(config, tokenizer, self.dtype).policy
        names = ("temperature", "top_k", "top_p", "min_p")
        sampling = {name: config[name] for name in names}
        return RolloutEngine(
            self.cfg,
            build_machine(described, config, policy, config.max_response_tokens, sampling),
            vocabulary_shapes(tuple(config.triggers), self.cfg.vocab_size, self.sampling),
            lanes=0,
            max_prompt=config.max_prompt_tokens,
            dtype=jnp.dtype(config.cache_dtype or self.dtype),
            mesh=self.sampling,
            attention=choose_attention(self.config.model.attention, self.sampling),
        )

    @cached_property
    def rollout(self) -> Programs:
        """The programs of the rollout."""
        return self.engine.programs(self.lanes * axis_size(self.sampling, "data"))

    def lower(self, program: str) -> Any:
        """One program of `STAGES`, lowered for the devices."""
        return self._update(program) if program in UPDATE else self._rollout(program)

    def _rollout(self, program: str) -> Any:
        if program == "weights":
            where = decode_shardings(self.whole, self.cfg, self.config.model.dtype, self.mesh)
            cut = jax.jit(qwen.decode_layer, static_argnums=2, out_shardings=where["layers"][0])
            return cut.lower(self.whole["layers"], np.int32(0), self.config.model.dtype)
        plan = self.rollout.plan(self.decode_weights(self.sampling))
        ladder = self.rollout.ladder
        lanes, capacity, width = ladder.packed[0], ladder.capacities[-1], ladder.widths[-1]
        key: dict[str, Callable[[], Any]] = {
            "prefill": lambda: ("prefill", width),
            "insert": lambda: ("insert", Shape(lanes, capacity), width),
            "segment": lambda: ("segment", Shape(lanes, capacity)),
            "grow": lambda: ("resize", Shape(lanes, ladder.capacities[-2]), capacity),
        }
        return plan[key[program]()]()

    def _update(self, program: str) -> Any:
        update: Any = build_update(self.cfg, self.config, optimizer_of(self.config.grpo), self.mesh)
        zero: Any = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(self.mesh))
        sums = LossSums(*[zero] * len(LossSums._fields))
        count = jax.ShapeDtypeStruct((), jnp.int32)
        if program == "log-probs":
            return update.logprobs.lower(self.params, self.packed, count, self.base)
        if program == "accumulate":
            return update.accumulate.lower(self.params, self.params, sums, self.batch, count, self.base)
        return update.apply.lower(self.state, self.params, sums)

    # ------------------------------------------------------------------ sizes

    def sizes(self) -> Sizes:
        """What the run holds on a device."""
        completions = self.config.prompts_per_step * self.config.rollout.samples
        engine, groups = self.engine, row_shares(self.mesh)
        a_token = sum(x.dtype.itemsize for x in smallest_batch()) + 2 * 4  # and two log-probs
        updates = math.ceil(self.config.prompts_per_step / self.config.grpo.prompts_per_update)
        of_update = self.config.grpo.prompts_per_update * self.config.rollout.samples
        a_batch = math.ceil(of_update / groups) * self.config.grpo.row_length * a_token
        tensor = axis_size(self.mesh, "tensor")
        lane = lane_bytes(self.cfg, engine.machine, engine.vocab, engine.capacity, engine.dtype, tensor)
        held = {
            "base": device_bytes(self.base),
            "params": device_bytes(self.params),
            "embeddings": device_bytes({k: v for k, v in self.whole.items() if k != "layers"}),
            "moments": device_bytes(self.state.opt_state),
            "reference": device_bytes(self.first),
            "gradients": device_bytes(self.params),
            "decode weights": device_bytes(self.decode_weights(self.mesh)),
            "tables": device_bytes(engine.vocab),
            # Those of a step, which have room for completions that fill a row each; and without one update's.
            "batches": updates * a_batch,
            "other batches": (updates - 1) * a_batch,
            "cache": lane,
            # Two batches of prefilled prompts at a time, each of one prompt for sixteen lanes.
            "prompts": math.ceil(lane * 2 / 16 * self.config.rollout.max_prompt_tokens / engine.capacity),
        }
        return Sizes(
            held=held,
            numbers=sum(x.size for x in jax.tree.leaves(qwen.abstract_params(self.cfg))),
            groups=groups,
            groups_here=axis_size(self.sampling, "data"),
            row_shares=groups,
            mesh=tuple(self.mesh.shape.values()),  # type: ignore[arg-type]
            wanted=math.ceil(completions / groups),
            grows=len(engine.programs(groups).ladder.capacities) > 1,
        )


def beside(program: str, held: Mapping[str, int], lanes: int) -> int:
    """Bytes of a device that the run holds beside the arguments of a program.

    Args:
        program: one of `STAGES`.
        held: from `Sizes`.
        lanes: of a group.
    """
    of_lanes = ("cache", "prompts")
    return sum(held[name] * (lanes if name in of_lanes else 1) for name in STAGES[program])


def chosen_lanes(sizes: Sizes, topology: str, *, annex: bool = False) -> int:
    """Lanes of a group that the run itself would choose (`config.rollout.lanes` of 0); 0 if none fits."""
    resident = ("base", "params", "moments", "reference", "decode weights", "tables")
    free = int(chip_of(topology).hbm - sum(sizes.held[name] for name in resident))
    try:
        return lanes_that_fit([free], sizes.held["cache"], sizes.wanted, annex=annex)
    except UserError:
        return 0


# ---------------------------------------------------------------------- stand-ins


class StandIn:
    """A tokenizer of no language: settings of the rollout need some ids, and a program any."""

    unk_token_id = None
    name_or_path = "stand-in"

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """An id for every word and every other character."""
        del add_special_tokens
        pieces = [text] if text.startswith("</") else re.findall(r"\w+|\W", text)
        return [zlib.crc32(piece.encode()) % 1000 + 2 for piece in pieces]


def vocabulary_shapes(triggers: tuple[str, ...], size: int, mesh: Mesh) -> Vocabulary:
    """The token tables of a vocabulary of `size`: shapes, but the automata of the triggers themselves."""
    small = build_vocabulary([*(word.encode() for word in triggers), b" "], triggers)

    def of_tokens(table: jax.Array) -> Any:
        return jax.ShapeDtypeStruct((size,), table.dtype, sharding=replicated(mesh))

    def automaton(table: TriggerTable) -> TriggerTable:
        arrays: list[Any] = [np.asarray(array) for array in table]
        return TriggerTable(*arrays)._replace(token_class=of_tokens(table.token_class))

    automata = automaton(small.triggers), automaton(small.delimiters)
    return Vocabulary(*automata, *map(of_tokens, small[2:]))


def smallest_batch() -> PackedBatch:
    """A batch of one sample, to see the types of its arrays."""
    number, score = np.zeros(1, np.int32), np.zeros(1, np.float32)
    sample = Sample(number, number, advantage=0.0, sampler_logprobs=score, loss_mask=score)
    return pack([sample], row_length=2, rows=1)[0]


# ---------------------------------------------------------------------- trees of shapes


def placed(shapes: Any, where: Any) -> Any:
    """The shapes of a tree with where its arrays lie."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device."""

    def of(leaf: Any) -> int:
        where = getattr(leaf, "sharding", None)
        shape = where.shard_shape(leaf.shape) if where is not None else leaf.shape
        return math.prod(shape) * jax.dtypes.itemsize_bits(leaf.dtype) // 8

    return sum(map(of, jax.tree.leaves(tree)))
