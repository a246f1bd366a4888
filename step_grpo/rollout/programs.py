"""The compiled programs of a rollout: a short ladder of shapes, all compiled before the first token.

A rollout state has a shape: the number of lanes and the tokens that each lane's cache holds. It starts with
every lane and a small cache. The few completions that outgrow it move to the annex, a second state of few
lanes with the largest cache; the cache itself doubles when more do, and halves when few need it. Once the
queue is empty and most lanes are free, the rest goes to the annex, which is packed as its completions end;
where there is none, the state is packed. Both are packed into a quarter as many lanes at a time. Every
program is compiled ahead of time and called by shape, so a shape that nobody planned is an error and never a
silent compilation.
"""

import itertools
import os
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from step_grpo.mesh import axis_size, over_data, replicated, spec_of
from step_grpo.model import qwen
from step_grpo.model.attention import XLA, Attention
from step_grpo.model.cache import LayerCache
from step_grpo.rollout import decode
from step_grpo.rollout.decode import Prefilled, RolloutState
from step_grpo.rollout.phases import Machine
from step_grpo.rollout.triggers import Vocabulary, reach

CAPACITY_LEVELS = 3  # full, half, quarter
LEAST_CAPACITY = 128  # tokens below which a smaller cache is not worth a program
PACKING = 4  # lanes are packed into a quarter, and again
ANNEX_SHARE = 8  # one lane in so many has a place in the annex
LEAST_LANES = 8  # of a device, below which packing saves nothing: a rung costs programs for each capacity
LEAST_ANNEX = 2  # of a device: the last few completions last long, and a rung of the annex is one program
WIDTH_LEVELS = 3  # prompts padded to the full width, half, a quarter


class Shape(NamedTuple):
    """What a rollout state has room for."""

    lanes: int  # over all devices
    capacity: int  # tokens of a lane's cache


class Ladder(NamedTuple):
    """The shapes that a rollout may pass through."""

    capacities: tuple[int, ...]  # the smallest first
    packed: tuple[int, ...]  # lanes over all devices, the most first; the first is all of them
    annex: tuple[int, ...]  # lanes of the annex over all devices, the most first; empty for none
    widths: tuple[int, ...]  # of padded prompts, the smallest first

    @property
    def shapes(self) -> list[Shape]:
        """Every shape of the state, but for the annex."""
        return [Shape(lanes, capacity) for lanes in self.packed for capacity in self.capacities]

    @property
    def annex_shapes(self) -> list[Shape]:
        """Of the annex; its numbers of lanes are none of those of the state."""
        return [Shape(lanes, self.capacities[-1]) for lanes in self.annex]


def make_ladder(lanes: int, capacity: int, max_prompt: int, devices: int, *, annex: bool) -> Ladder:
    """The shapes between a start and what the longest completion needs.

    Args:
        lanes: over all devices.
        capacity: tokens of the longest prompt, completion and check.
        max_prompt: tokens of the longest prompt.
        devices: number of devices that share the lanes.
        annex: outliers may have lanes of their own, where there are lanes enough.
    """
    capacities = halvings(capacity, CAPACITY_LEVELS, LEAST_CAPACITY, 64)
    local = lanes // devices
    aside = annex_lanes(local) if annex and len(capacities) > 1 else 0
    packed = [local] if aside else packings(local, LEAST_LANES)
    return Ladder(
        capacities,
        tuple(n * devices for n in packed),
        tuple(n * devices for n in packings(aside, LEAST_ANNEX) if n),
        halvings(max_prompt, WIDTH_LEVELS, 32, 32),
    )


def packings(most: int, least: int) -> list[int]:
    """`most` lanes, a quarter of them and so on, but for fewer than `least`."""
    lanes = [most]
    while lanes[-1] // PACKING >= least:
        lanes.append(lanes[-1] // PACKING)
    return lanes


def annex_lanes(lanes: int) -> int:
    """Lanes of a device's annex; 0 where it has so few lanes that there is no annex."""
    aside = max(LEAST_LANES, lanes // ANNEX_SHARE)
    return aside if 2 * aside <= lanes else 0


def halvings(most: int, levels: int, least: int, multiple: int) -> tuple[int, ...]:
    """`most` and its halves, each rounded up to a multiple, at most `levels` of them, the smallest first."""
    sizes = [round_up(most, multiple)]
    while len(sizes) < levels and round_up(sizes[-1] // 2, multiple) >= least:
        half = round_up(sizes[-1] // 2, multiple)
        if half == sizes[-1]:
            break
        sizes.append(half)
    return tuple(reversed(sizes))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is at least `value`."""
    return -(-value // multiple) * multiple


class Programs:
    """The programs of one engine, called by shape."""

    def __init__(
        self,
        cfg: qwen.QwenConfig,
        machine: Machine,
        vocab: Vocabulary,
        judge_params: qwen.Params | None,
        ladder: Ladder,
        *,
        rows: int,
        dtype: Any,
        mesh: Mesh,
        attention: Attention = XLA,
    ):
        """Remembers the settings; `compile` comes next.

        Args:
            cfg: architecture.
            machine: settings of the rollout.
            vocab: token tables, arrays or their shapes but for those of `reach`.
            judge_params: of the second model that checks ask, on every device.
            ladder: shapes.
            rows: prompts that a device prefills at a time.
            dtype: of the cache.
            mesh: with `data`, over which the lanes are spread, and perhaps `tensor`, over which the compiler
                spreads their heads and the vocabulary. A "device" of the other arguments is a part of `data`.
            attention: the implementation.
        """
        self.ladder, self.rows, self._mesh, self._vocab = ladder, rows, mesh, vocab
        self._here, self._everywhere = over_data(mesh), replicated(mesh)
        self._cfg, self._machine, self._judge_params, self._attention = cfg, machine, judge_params, attention
        self._make_state = partial(
            decode.empty_state, cfg, machine, dtype=dtype, reach=reach(vocab.triggers), attention=attention
        )
        self._prefill = partial(decode.prefill, cfg, machine.judge, attention=attention)
        self._programs: dict[Hashable, Any] = {}

    def compile(self, params: qwen.Params) -> "Programs":
        """Compiles everything, side by side on the host's cores; `params` as for `plan`."""
        with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
            planned = self.plan(params)
            made = pool.map(lambda lower: lower().compile(), planned.values())
            self._programs = dict(zip(planned, made, strict=True))
        return self

    @property
    def judge_prefix(self) -> int:
        """Tokens that the second model reads before the prompt."""
        return len(self._machine.judge.prefix) if self._machine.judge else 0

    @property
    def judge_ahead(self) -> int:
        """Tokens that the second model may have read beyond those that a lane's length counts."""
        return self._machine.judge_ahead

    # ------------------------------------------------------------------ what the engine calls

    def empty(self, shape: Shape) -> RolloutState:
        """Every lane free; the first shape of the ladder, or of the annex."""
        return self._programs["empty", shape]()

    def prefill(self, params, tokens, lengths) -> Prefilled:
        """Prompts `[devices * rows, width]`, each device's own behind one another."""
        return self._programs["prefill", tokens.shape[1]](params, self._judge_params, tokens, lengths)

    def insert(
        self, state: RolloutState, prefilled: Prefilled, row, prompt_id, sample_id, limit
    ) -> RolloutState:
        """Starts completions in lanes; `row` counts the device's own prompts."""
        width = prefilled.cache[0].capacity
        program = self._programs["insert", shape_of(state), width]
        return program(state, prefilled, row, prompt_id, sample_id, limit)

    def segment(self, params, run_key, state: RolloutState, max_steps, stop_live):
        """Advances all lanes; `stop_live` is `[devices]`."""
        program = self._programs["segment", shape_of(state)]
        return program(params, self._vocab, run_key, state, max_steps, stop_live, self._judge_params)

    def resize(self, state: RolloutState, capacity: int) -> RolloutState:
        """Gives every lane's cache room for `capacity` tokens, a neighbour of the present one."""
        return self._programs["resize", shape_of(state), capacity](state)

    def pack(self, state: RolloutState, lanes_B) -> RolloutState:
        """Keeps the lanes `lanes_B` of each device (counted within it), the next fewer of the ladder."""
        return self._programs["pack", shape_of(state)](state, lanes_B)

    def move(self, state: RolloutState, annex: RolloutState, row) -> tuple[RolloutState, RolloutState]:
        """Lanes to the annex; `row` names for each of its lanes one of its device's, or -1."""
        return self._programs["move", shape_of(state)](state, annex, row)

    # ------------------------------------------------------------------ how they are made

    def plan(self, params: qwen.Params) -> dict[Hashable, Callable[[], Any]]:
        """Every program by its key, each ready to be lowered.

        Args:
            params: `qwen.decode_params`, a copy for every part of `data`; their shapes are enough.
        """
        n = axis_size(self._mesh, "data")
        judge_params = self._judge_params
        local, all_ = PartitionSpec("data"), PartitionSpec()
        cfg, machine = self._cfg, self._machine
        count = self._abstract((), jnp.int32, self._everywhere)
        per_device = self._abstract((n,), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=self._everywhere)
        annex = self.ladder.annex_shapes
        plan: dict[Hashable, Callable[[], Any]] = {}
        for shape in [self.ladder.shapes[0], *annex[:1]]:
            empty = partial(self._make_state, lanes=shape.lanes // n, capacity=shape.capacity)
            plan["empty", shape] = self._lower(empty, (), (), local)
        for width in self.ladder.widths:
            prompts = self._abstract((n * self.rows, width), jnp.int32)
            lengths = self._abstract((n * self.rows,), jnp.int32)
            prefill = params, judge_params, prompts, lengths
            plan["prefill", width] = self._lower(self._prefill, prefill, (all_, all_, local, local), local)
        segment = partial(decode.decode_segment, cfg, machine, attention=self._attention)
        for shape in [*self.ladder.shapes, *annex]:
            state = self._state(shape)
            arguments = (params, self._vocab, key, state, count, per_device, judge_params)
            specs = (all_, all_, all_, local, all_, local, all_)
            plan["segment", shape] = self._lower(segment, arguments, specs, local, donate=3)
        for shape in self.ladder.shapes[: len(self.ladder.capacities)]:
            for width in self.ladder.widths:
                if width + self.judge_prefix <= shape.capacity:
                    plan["insert", shape, width] = partial(self._lower_insert, params, shape, width)
        for shape in self.ladder.shapes if annex else []:
            lanes = self._abstract((annex[0].lanes,), jnp.int32)
            states = self._state(shape), self._state(annex[0])
            plan["move", shape] = self._lower(
                decode.move, (*states, lanes), (local,) * 3, local, donate=(0, 1)
            )
        return plan | self._plan_resizes() | self._plan_packings()

    def _lower_insert(self, params: qwen.Params, shape: Shape, width: int) -> Any:
        lanes = self._abstract((shape.lanes,), jnp.int32)
        arguments = (self._state(shape), self._prefilled(params, width), lanes, lanes, lanes, lanes)
        local = PartitionSpec("data")
        return self._lower(decode.insert, arguments, (local,) * 6, local, donate=0)()

    def _plan_resizes(self) -> dict[Hashable, Callable[[], Any]]:
        local = PartitionSpec("data")
        neighbours = list(itertools.pairwise(self.ladder.capacities))
        plan: dict[Hashable, Callable[[], Any]] = {}
        for lanes in self.ladder.packed:
            for old, new in [*neighbours, *((large, small) for small, large in neighbours)]:
                shape = Shape(lanes, old)
                resize = partial(decode.resize, capacity=new)
                plan["resize", shape, new] = self._lower(resize, (self._state(shape),), (local,), local)
        return plan

    def _plan_packings(self) -> dict[Hashable, Callable[[], Any]]:
        local = PartitionSpec("data")
        plan: dict[Hashable, Callable[[], Any]] = {}
        steps = [
            (Shape(old, capacity), new)
            for old, new in itertools.pairwise(self.ladder.packed)
            for capacity in self.ladder.capacities
        ]
        steps += [(old, new.lanes) for old, new in itertools.pairwise(self.ladder.annex_shapes)]
        for shape, new in steps:
            arguments = (self._state(shape), self._abstract((new,), jnp.int32))
            plan["pack", shape] = self._lower(decode.pack, arguments, (local, local), local)
        return plan

    def _on_each_device(self, function, in_specs, out_specs):
        """Each part of `data` for itself; `tensor`, if there is one, is left to the compiler."""
        spread = axis_size(self._mesh, "tensor") > 1
        return jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names={"data"} if spread else set(self._mesh.axis_names),
            check_vma=False,
        )

    def _lower(self, function, arguments, in_specs, out_specs, donate=()):
        def lower():
            sharded = self._on_each_device(function, in_specs, out_specs)
            # Said of outputs too: an array of size 0 would else lose its sharding, and its reader refuse it.
            where = self._where(jax.eval_shape(sharded, *arguments))
            return jax.jit(sharded, donate_argnums=donate, out_shardings=where).lower(*arguments)

        return lower

    def _where(self, tree: Any) -> Any:
        """Where every array of a tree lies: over `data`, and the heads of a cache over `tensor` too."""

        def of_cache(array):
            heads = "kv_heads" if array.shape[1] % axis_size(self._mesh, "tensor") == 0 else None
            return NamedSharding(self._mesh, spec_of(self._mesh, ["rows", heads]))

        def where(part):
            return jax.tree.map(of_cache, part) if isinstance(part, LayerCache) else self._here

        return jax.tree.map(where, tree, is_leaf=lambda part: isinstance(part, LayerCache))

    def _placed(self, tree: Any) -> Any:
        """The shapes of a tree, with where its arrays lie."""
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, self._where(tree)
        )

    def _abstract(self, shape, dtype, sharding: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or self._here)

    def _state(self, shape: Shape) -> RolloutState:
        make = partial(self._make_state, lanes=shape.lanes, capacity=shape.capacity)
        return self._placed(jax.eval_shape(make))

    def _prefilled(self, params: qwen.Params, width: int) -> Prefilled:
        rows = axis_size(self._mesh, "data") * self.rows
        tokens, lengths = self._abstract((rows, width), jnp.int32), self._abstract((rows,), jnp.int32)
        local, all_ = PartitionSpec("data"), PartitionSpec()
        prefill = self._on_each_device(self._prefill, (all_, all_, local, local), local)
        return self._placed(jax.eval_shape(prefill, params, self._judge_params, tokens, lengths))


def shape_of(state: RolloutState) -> Shape:
    """The shape of a state."""
    return Shape(state.lane.phase.shape[0], state.cache[0].capacity)
