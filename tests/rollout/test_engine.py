import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import BruteForce

from step_grpo.errors import UserError
from step_grpo.mesh import make_mesh
from step_grpo.model import qwen
from step_grpo.model.attention import XLA, Attention
from step_grpo.reward.steps import trigger_pattern
from step_grpo.rollout import engine as engine_module
from step_grpo.rollout import programs
from step_grpo.rollout.engine import RolloutEngine, identity, lanes_that_fit
from step_grpo.rollout.phases import Machine
from step_grpo.rollout.policies import Confidence, Judge, Sufficiency, Verifier
from step_grpo.rollout.triggers import build_vocabulary

TEXTS = [
    b"<eos>",
    b"<end>",
    b"</think>",
    b"Wait",
    b" Wait",
    b".Wait",
    b"ing",
    b" a",
    b" b",
    b"c",
    b"  ",
    b"\n",
    b"{",
    b"}",
]
# Triggers in pieces, with texts around them and empty tokens in between; two in one token's reach.
SPLIT_TEXTS = [
    b"<eos>",
    b"<end>",
    b"</think>",
    b"W",
    b" Wa",
    b"ait",
    b"it",
    b" Wait.",
    b"Hold",
    b" on",
    b"",
    b"\n",
    b"Wait",
    b" a",
]
CFG = qwen.QwenConfig(
    vocab_size=len(TEXTS), width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn=48, rope_theta=1e4,
    rms_eps=1e-6, tied=False, qk_norm=True, qkv_bias=False, init_std=0.35,
)  # fmt: skip
# Another architecture, with another width, reads along as the verifier.
JUDGE_CFG = qwen.QwenConfig(
    vocab_size=len(TEXTS), width=24, layers=1, heads=2, kv_heads=1, head_dim=12, ffn=32, rope_theta=1e4,
    rms_eps=1e-6, tied=True, qk_norm=False, qkv_bias=True, init_std=0.5,
)  # fmt: skip
PROBE = Confidence(question=(11, 12), max_notes=5, delta=0.3, strict=False, early_abort=False)
SUFFICIENCY = Sufficiency(question=(11, 9, 12), yes=(7, 8), no=(9, 3, 4), threshold=60, min_gap=4)
VERIFIER = Verifier(
    question=(12, 13), yes=(9, 7), no=(8, 3, 4), threshold=0.6, judge=Judge(JUDGE_CFG, prefix=(9, 11, 7))
)
MACHINE = Machine(
    policy=PROBE, max_response=72, think_budget=60, budget_margin=8, max_probes=4, max_repetitions=2,
    temperature=1.0, top_p=1.0, think_end=2, eos=(0, 1), closing=(11, 2, 11),
)  # fmt: skip
TEXTS_OF = {False: TEXTS, True: SPLIT_TEXTS}
TRIGGERS = ("Wait", "Hold on")
DELIMITERS = ("bc", "\n", "it", " aW")  # in pieces, alone, in and around a trigger
PROMPTS = [(7, 9, 11), (8,), (9, 9, 7, 13, 12), (10, 11)]
KEY = jax.random.key(3)


@functools.cache
def make_params():
    """Random weights under which ends are rare and triggers frequent: long completions, many probes."""
    params = qwen.init_params(CFG, 1)
    scale = jnp.ones(CFG.vocab_size).at[jnp.array([0, 1, 2])].set(0.2)
    return {**params, "head_DV": params["head_DV"] * scale}


@functools.cache
def make_judge():
    return qwen.init_params(JUDGE_CFG, 2)


@pytest.fixture
def params():
    return make_params()


@functools.cache
def run_named(name, split=False):
    return run(make_params(), MACHINES[name], split=split)


def make_engine(machine, lanes, mesh, split=False, attention=XLA):
    vocab = build_vocabulary(TEXTS_OF[split], TRIGGERS, DELIMITERS)
    judge = VERIFIER.judge_params(make_judge(), jnp.float32) if machine.judge else None
    return RolloutEngine(
        CFG,
        machine,
        vocab,
        lanes=lanes,
        max_prompt=8,
        dtype=jnp.float32,
        mesh=mesh,
        judge_params=judge,
        attention=attention,
    )


@functools.cache
def shared_engine(machine, lanes, split=False):
    """One for all tests that leave its shapes alone, with two lanes a device where there are as many."""
    return make_engine(machine, lanes, make_mesh(max(1, lanes // 2)), split)


def run(params, machine, lanes=4, prompts=PROMPTS, samples=3, split=False):
    engine = shared_engine(machine, lanes, split)
    return engine(qwen.decode_params(params, jnp.float32), prompts, samples, KEY)[0]


MACHINES = {
    "truncated": MACHINE,
    "strict": dataclasses.replace(
        MACHINE, policy=dataclasses.replace(PROBE, strict=True, delta=0.05, max_notes=8)
    ),
    "tempered": dataclasses.replace(
        MACHINE,
        policy=dataclasses.replace(PROBE, delta=0.6),
        temperature=0.7,
        top_k=10,
        top_p=0.9,
        min_p=0.01,
    ),
    "repetitive": dataclasses.replace(
        MACHINE, policy=dataclasses.replace(PROBE, delta=1.0), max_repetitions=1, max_probes=2
    ),
    "unbudgeted": dataclasses.replace(MACHINE, think_budget=72, budget_margin=0),
    "sufficiency": dataclasses.replace(MACHINE, policy=SUFFICIENCY),
    "verifier": dataclasses.replace(MACHINE, policy=VERIFIER),
    "plain": dataclasses.replace(MACHINE, policy=None),
    "greedy": dataclasses.replace(MACHINE, policy=None, temperature=0.0),
}


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("name", MACHINES)
def test_engine_equals_brute_force_loop(params, name, split):
    if split and not MACHINES[name].truncate:
        pytest.skip("plain sampling reads no text")
    machine = MACHINES[name]
    reference = BruteForce(
        params, CFG, machine, TEXTS_OF[split], TRIGGERS, longest=96, judge=make_judge(), delimiters=DELIMITERS
    )
    for c in run_named(name, split):
        prompt = PROMPTS[c.prompt]
        tokens, logprobs, forced, reason, confidences = reference(prompt, KEY, identity(prompt), c.sample)
        assert c.tokens.tolist() == tokens
        assert c.forced.tolist() == forced
        assert c.reason == reason
        np.testing.assert_allclose(c.logprobs, logprobs, atol=1e-4)
        np.testing.assert_allclose(c.confidences, confidences, atol=1e-4)


@pytest.mark.parametrize("name", ["unbudgeted", "repetitive", "verifier"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_exit_in_the_last_place_of_a_completion_ends_it(params, name, split):
    """Each completion that left its thinking early is made again with room for one token of its exit."""
    machine = MACHINES[name]
    before = run(params, machine, samples=12, split=split)
    limits = [1 + int(np.argmax(c.forced)) if c.forced.any() else 1 + i % 9 for i, c in enumerate(before)]
    if machine.judge:  # the delimiter is recorded, and fills it
        limits = [max(1, limit - 1) for limit in limits]
    engine = shared_engine(machine, 4, split)
    completions, _ = engine(qwen.decode_params(params, jnp.float32), PROMPTS, 12, KEY, limits=limits)
    reference = BruteForce(
        params, CFG, machine, TEXTS_OF[split], TRIGGERS, longest=96, judge=make_judge(), delimiters=DELIMITERS
    )
    exits = 0
    for c, limit in zip(completions, limits, strict=True):
        prompt = PROMPTS[c.prompt]
        tokens, _, forced, reason, _ = reference(prompt, KEY, identity(prompt), c.sample, limit)
        assert c.tokens.tolist() == tokens and len(tokens) <= limit
        assert (c.forced.tolist(), c.reason) == (forced, reason)
        exits += reason in ("early_exit", "rep") and len(tokens) == limit
    assert exits or not split  # whole triggers are confirmed one token later, and end with `length`


def test_answer_draws_noise_that_no_discarded_token_has_used(params):
    """With even logits a token tells its noise alone, so plain sampling tells what an exit discarded."""
    even = {**params, "head_DV": jnp.zeros_like(params["head_DV"])}
    machine = dataclasses.replace(
        MACHINE, policy=dataclasses.replace(PROBE, delta=0.0), closing=(11,), eos=(-1,), think_end=-1
    )
    left = run(even, machine, samples=60, split=True)
    plain = run(even, dataclasses.replace(machine, policy=None), samples=60, split=True)
    texts, used, fresh = SPLIT_TEXTS, [], []
    for c, p in zip(left, plain, strict=True):
        if c.reason == "early_exit":
            cut = int(np.argmax(c.forced))
            standing = next(
                n
                for n in range(cut + 1, len(p.tokens) + 1)
                if confirmed(b"".join(texts[t] for t in p.tokens[cut:n]).decode())
            )
            used += (c.tokens[cut + 1 : standing] == p.tokens[cut + 1 : standing]).tolist()
            fresh += (c.tokens[standing:] == p.tokens[standing:]).tolist()
    assert len(used) > 50 and np.mean(used) < 0.3  # 1 / 14 expected
    assert len(fresh) > 1000 and all(fresh)  # nothing else changes


def confirmed(text):
    """Whether a trigger in it has a byte behind it."""
    return any(match.end() < len(text) for match in trigger_pattern(TRIGGERS).finditer(text))


def test_static_batches_make_the_same_completions_in_more_lane_steps(params):
    ready, made = qwen.decode_params(params, jnp.float32), {}
    for rebatch in (True, False):
        engine = shared_engine(MACHINE, 4) if rebatch else make_engine(MACHINE, 4, make_mesh(2))
        engine.rebatch = rebatch
        made[rebatch] = engine(ready, PROMPTS, 3, KEY)
    (refilled, cost), (static, static_cost) = made[True], made[False]
    assert [c.tokens.tolist() for c in static] == [c.tokens.tolist() for c in refilled]
    assert static_cost.live_steps == cost.live_steps and static_cost.lane_steps > cost.lane_steps
    assert static_cost.moves == 0 and len(static) > 4 * 2


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_brute_force_cases_reach_every_reason(split):
    """Else the comparison above would compare less than it says."""
    seen = {c.reason for name in MACHINES for c in run_named(name, split)}
    assert seen == {"natural", "early_exit", "budget", "rep", "eos", "length"}


def test_cache_has_room_for_a_question_longer_than_a_segment(params):
    """Where the lane stands still, its own length says nothing of the verifier's."""
    asking = dataclasses.replace(VERIFIER, question=(12, 13) * 40, threshold=1.0)
    machine = dataclasses.replace(MACHINE, policy=asking, max_probes=50, max_repetitions=10**6)
    reference = BruteForce(
        params, CFG, machine, TEXTS, TRIGGERS, longest=192, judge=make_judge(), delimiters=DELIMITERS
    )
    completions = run(params, machine, prompts=PROMPTS[2:3], samples=4)
    assert max(len(c.confidences) for c in completions) > 15
    for c in completions:
        tokens, *_, scores = reference(PROMPTS[2], KEY, identity(PROMPTS[2]), c.sample)
        assert c.tokens.tolist() == tokens
        np.testing.assert_allclose(c.confidences, scores, atol=1e-4)


def same(a, b):
    return all(
        x.tokens.tolist() == y.tokens.tolist()
        and x.reason == y.reason
        and np.allclose(x.logprobs, y.logprobs, atol=1e-5)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", ["sufficiency", "verifier"])
def test_policies_both_pass_and_decline(name):
    runs = [c for split in (False, True) for c in run_named(name, split)]
    scores = np.concatenate([c.confidences for c in runs])
    passes = MACHINES[name].policy.passes(scores)
    assert np.sum(passes) > 3 and np.sum(~passes) > 10
    assert np.all((scores >= 0) & (scores <= 1))
    assert np.sum(passes) == sum(c.reason == "early_exit" for c in runs)


@pytest.mark.parametrize(
    ("name", "lanes"), [("truncated", 1), ("truncated", 3), ("truncated", 16), ("verifier", 3)]
)
def test_lanes_and_refill_change_nothing(params, name, lanes):
    assert same(run_named(name), run(params, MACHINES[name], lanes=lanes))


def test_order_and_company_of_prompts_change_nothing(params):
    shuffled = run(params, MACHINE, prompts=PROMPTS[::-1])
    there = {(len(PROMPTS) - 1 - c.prompt, c.sample): c for c in shuffled}
    here = run_named("truncated")
    assert same(here, [there[c.prompt, c.sample] for c in here])


def test_known_completions_are_not_made_again_and_change_nothing(params):
    """A whole group, the last of one, and single ones; told by what each segment finishes."""
    expected = run_named("truncated")
    known = [c for c in expected if c.prompt == 1 or (c.prompt, c.sample) in {(0, 2), (3, 0)}]
    engine, made, progress = shared_engine(MACHINE, 4), [], []
    ready = qwen.decode_params(params, jnp.float32)
    completions, stats = engine(
        ready, PROMPTS, 3, KEY, on_progress=progress.append, known=known[::-1], on_finished=made.extend
    )
    assert same(expected, completions)
    there = {(c.prompt, c.sample) for c in made}
    assert there == {(c.prompt, c.sample) for c in expected} - {(c.prompt, c.sample) for c in known}
    assert len(made) == len(there) and progress[-1] == len(expected)
    assert stats.known_tokens == sum(len(c.tokens) for c in known)
    completions, stats = engine(ready, PROMPTS, 3, KEY, known=expected)
    assert same(expected, completions) and stats.steps == 0


NEVER = {
    "confidence": dataclasses.replace(PROBE, delta=1.0),
    "sufficiency": dataclasses.replace(SUFFICIENCY, threshold=101),
    "verifier": dataclasses.replace(VERIFIER, threshold=1.0),
}


@pytest.mark.parametrize(
    ("name", "split"),
    [("confidence", False), ("confidence", True), ("sufficiency", True), ("verifier", True)],
)
def test_declined_probe_leaves_tokens_and_randomness_unchanged(params, name, split):
    """Checks that can never pass, in a machine without other exits, give plain sampling."""
    never = dataclasses.replace(
        MACHINE,
        policy=NEVER[name],
        think_budget=10**6,
        budget_margin=0,
        max_repetitions=10**6,
        max_probes=50,
    )
    probed, plain = run(params, never, split=split), run_named("plain")
    assert sum(len(c.confidences) for c in probed) > 30
    assert all(a.tokens.tolist() == b.tokens.tolist() for a, b in zip(probed, plain, strict=True))
    for a, b in zip(probed, plain, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize(("name", "saves"), [("truncated", False), ("tempered", True), ("repetitive", True)])
def test_early_abort_of_probes_changes_nothing_but_their_cost(params, name, saves):
    full = run_named(name)
    policy = dataclasses.replace(MACHINES[name].policy, early_abort=True)
    early, delta = run(params, dataclasses.replace(MACHINES[name], policy=policy)), policy.delta
    assert same(full, early)
    for a, b in zip(full, early, strict=True):
        assert a.forced.tolist() == b.forced.tolist()
        assert (a.confidences > delta).tolist() == (b.confidences > delta).tolist()
        assert b.probe_tokens <= a.probe_tokens
    assert saves == (sum(c.probe_tokens for c in early) < sum(c.probe_tokens for c in full))


def test_prompt_too_long_is_refused(params):
    with pytest.raises(ValueError, match="prompt 0 has 9 tokens; expected 1 to 8"):
        run(params, MACHINE, prompts=[tuple(range(9))])


@pytest.mark.parametrize("kind", ["xla", "cudnn"])
def test_shapes_change_nothing(params, monkeypatch, kind):
    """With an annex, and with lanes that are packed. The cuDNN path falls back to XLA's for float32."""
    expected = run_named("truncated")
    small_steps(monkeypatch)
    used = watch_programs(monkeypatch, "resize", "move", "pack")
    engine = make_engine(MACHINE, lanes=16, mesh=make_mesh(2), attention=Attention(kind))
    completions, stats = engine(qwen.decode_params(params, jnp.float32), PROMPTS, 20, KEY)
    assert same(expected, [c for c in completions if c.sample < 3])
    assert len(completions) == 20 * len(PROMPTS)
    wanted = {"xla": {"move"}, "cudnn": {"resize", "pack"}}[kind]
    assert wanted <= {name for name, *_ in used}
    assert stats.moves == sum(name == "move" for name, *_ in used)
    assert stats.resizes == sum(name != "move" for name, *_ in used)


def test_cache_grows_for_many_and_shrinks_for_few(params, monkeypatch):
    small_steps(monkeypatch)
    monkeypatch.setattr(engine_module, "SHRINK_AFTER", 2)
    used = watch_programs(monkeypatch, "resize", "move")
    weights, endless = (
        qwen.decode_params(params, jnp.float32),
        dataclasses.replace(MACHINES["plain"], eos=(-1,)),
    )
    limits = [72] * 4 + [20] * 10 + [72] + [20] * 9  # the first four are long together
    completions = {}
    for lanes in (4, 1):
        engine = make_engine(endless, lanes=lanes, mesh=make_mesh(1))
        completions[lanes], stats = engine(weights, PROMPTS, 6, KEY, limits=limits)
        assert stats.live_steps == sum(limits)  # a lane that moved away takes no more steps
        changes = [(shape.capacity, rest[0]) for name, shape, *rest in used if name == "resize"]
        assert {(64, 128), (128, 64)} == set(changes)
        assert (lanes == 4) == ("move" in {name for name, *_ in used})
        used.clear()
    assert [len(c.tokens) for c in completions[1]] == limits
    assert same(completions[4], completions[1])


def watch_programs(monkeypatch, *names):
    """A list that fills with (name, shape of the state, arguments) of these programs as they are called."""
    used = []

    def watched(name):
        original = getattr(programs.Programs, name)

        def call(self, state, *rest):
            used.append((name, programs.shape_of(state), *rest))
            return original(self, state, *rest)

        monkeypatch.setattr(programs.Programs, name, call)

    for name in names:
        watched(name)
    return used


def test_nothing_compiles_after_the_first_batch(params, monkeypatch, compile_events):
    small_steps(monkeypatch)
    weights = qwen.decode_params(params, jnp.float32)
    keys = [jax.random.fold_in(KEY, i) for i in range(11)]
    engine = make_engine(MACHINE, lanes=8, mesh=make_mesh(2))
    engine(weights, PROMPTS[1:2], 1, keys[0])
    assert compile_events
    compile_events.clear()
    for i in range(10):
        prompts = [(7 + (i + p) % 4,) * (1 + (i + 3 * p) % 8) for p in range(1 + i)]
        engine(weights, prompts, 1 + i % 3, keys[1 + i])
    assert not compile_events


def test_prompt_is_prefilled_once_for_its_group(params):
    engine = shared_engine(MACHINE, 1)
    _, stats = engine(qwen.decode_params(params, jnp.float32), PROMPTS, 7, KEY)
    assert stats.prefilled == len(PROMPTS) * 32  # one row of 32 tokens at a time


def test_live_steps_count_the_tokens_that_were_fed(params):
    engine = shared_engine(MACHINES["plain"], 4)
    completions, stats = engine(qwen.decode_params(params, jnp.float32), PROMPTS, 3, KEY)
    assert stats.live_steps == sum(len(c.tokens) for c in completions) <= stats.lane_steps


def test_devices_that_wait_for_others_are_charged(params):
    """One completion on two devices: lanes of the idle one stand still for as long."""
    engine = shared_engine(MACHINES["plain"], 4)
    (completion,), stats = engine(qwen.decode_params(params, jnp.float32), PROMPTS[:1], 1, KEY)
    assert stats.live_steps == stats.steps == len(completion.tokens)
    assert stats.lane_steps == 4 * stats.steps


def test_annex_takes_the_last_completions_in_turns_and_is_packed_as_they_end(params, monkeypatch):
    small_steps(monkeypatch)
    monkeypatch.setattr(programs, "LEAST_LANES", 4)
    monkeypatch.setattr(programs, "LEAST_ANNEX", 1)
    used = watch_programs(monkeypatch, "move", "pack")
    weights, endless = (
        qwen.decode_params(params, jnp.float32),
        dataclasses.replace(MACHINES["plain"], eos=(-1,)),
    )
    limits = [*[20 + i for i in range(14)], 60, 72]
    engine = make_engine(endless, lanes=8, mesh=make_mesh(1))
    completions, stats = engine(weights, PROMPTS, 4, KEY, limits=limits)
    assert [len(c.tokens) for c in completions] == limits
    assert same(
        completions, make_engine(endless, 1, make_mesh(1))(weights, PROMPTS, 4, KEY, limits=limits)[0]
    )
    assert [shape.lanes for name, shape, *_ in used if name == "pack"] == [4]
    assert stats.moves > 2 and stats.live_steps == sum(limits)


def small_steps(monkeypatch):
    """Shapes so close together that short completions pass through all of them."""
    monkeypatch.setattr(engine_module, "SEGMENT_STEPS", 8)
    monkeypatch.setattr(programs, "LEAST_CAPACITY", 32)
    monkeypatch.setattr(programs, "LEAST_LANES", 1)


@pytest.mark.parametrize(
    ("free", "wanted", "annex", "lanes"),
    [
        ([1000, 400], 100, False, 24),
        ([1000, 400], 100, True, 16),  # and 8 aside
        ([1000, 50], 100, True, 3),
        ([None], 100, True, 64),
        ([None], 5, False, 5),
        ([10**9], 10**9, True, 512),
    ],
)
def test_lanes_follow_the_poorest_device(free, wanted, annex, lanes):
    assert lanes_that_fit(free, 10, wanted, annex=annex) == lanes


def test_device_without_room_for_a_lane_is_named():
    with pytest.raises(UserError, match=r"config\.rollout\.max_response_tokens"):
        lanes_that_fit([2**30], 2**31, 4, annex=False)


def test_engine_chooses_its_lanes(params):
    engine = make_engine(MACHINE, lanes=0, mesh=make_mesh(2))
    completions, _ = engine(qwen.decode_params(params, jnp.float32), PROMPTS, 3, KEY)
    assert same(run_named("truncated"), completions)


@pytest.mark.parametrize("annex", [False, True])
@pytest.mark.parametrize(
    ("lanes", "capacity", "devices"), [(64, 315, 1), (128, 18459, 2), (3, 87, 1), (1, 40, 1), (16, 315, 1)]
)
def test_ladder_ends_at_what_the_longest_needs(lanes, capacity, devices, annex):
    ladder = programs.make_ladder(lanes, capacity, 2048, devices, annex=annex)
    assert ladder.capacities[-1] >= capacity and ladder.capacities[-1] - capacity < 64
    assert list(ladder.capacities) == sorted(set(ladder.capacities))
    assert ladder.widths[-1] == 2048
    assert ladder.packed[0] == lanes and all(n % devices == 0 for n in ladder.packed)
    shapes = [*ladder.shapes, *ladder.annex_shapes]
    assert len(set(shapes)) == len(shapes)
    assert all(n % devices == 0 for n in ladder.annex) and (annex or not ladder.annex)
    assert list(ladder.annex) == sorted(set(ladder.annex), reverse=True)
