"""The training run end to end, on the built-in model."""

import dataclasses
import re
import shutil
import weakref
from contextlib import suppress
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from quick_xla import devices_flag
from short_run import ONE_STEP, command, read_records, short_config, train
from test_checkpoint import file_system
from transformers import AutoModelForCausalLM

from step_grpo import checkpoint, cli
from step_grpo.data.prompts import EncodedPrompt
from step_grpo.data.sources import Question, load_questions
from step_grpo.errors import UserError
from step_grpo.grpo.logprobs import TokenLogprobs
from step_grpo.grpo.packing import Sample, pack, stack
from step_grpo.grpo.update import Measurements, TrainState, Update
from step_grpo.main import (
    Frozen,
    Sampled,
    Stopwatch,
    assert_disjoint,
    confidence_figures,
    mean_exits,
    reward_groups,
    sample_groups,
    sampling_figures,
    standard_error,
    take_prompts,
    trained_groups,
    training_samples,
    update_policy,
    weighted,
)
from step_grpo.mesh import make_mesh
from step_grpo.model.qwen import abstract_params
from step_grpo.model.weights import load_checkpoint, load_params
from step_grpo.reward.grading import Grade
from step_grpo.rollout.engine import Completion, RolloutStats
from step_grpo.rollout.policies import Confidence
from step_grpo.rollout_log import RolloutLog
from step_grpo.scoring import Scored, score_completions

EVALUATION = {"accuracy", "accuracy_low", "accuracy_high", "tokens", "steps", "questions"}


def identical(a, b) -> bool:
    """Whether two trees hold the same bits."""
    same = jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    return jax.tree.all(same)


def trained_weights(workdir):
    return checkpoint.open_model(workdir).params


# ---------------------------------------------------------------------- what a run leaves behind


def test_metrics_hold_one_line_a_step(finished_run):
    assert [line["step"] for line in finished_run.metrics] == [1, 2]


def test_result_has_the_documented_fields(finished_run):
    result = finished_run.result
    assert set(result) == {"before", "after", "exits", "seconds", "evaluation_seconds", "seed"}
    for name in ("before", "after"):
        assert set(result[name]) >= EVALUATION
        assert result[name]["questions"] == 16
        assert result[name]["accuracy_low"] <= result[name]["accuracy"] <= result[name]["accuracy_high"]
    assert result["seed"] == finished_run.config.seed
    assert result["seconds"] > 0


@pytest.mark.parametrize("name", ["before", "after"])
def test_result_is_the_mean_of_the_completions(finished_run, name):
    completions, result = finished_run.completions(name), finished_run.result[name]
    assert result["accuracy"] == np.mean([c["correct"] for c in completions])
    assert result["tokens"] == np.mean([len(c["token_ids"]) for c in completions])
    assert result["steps"] == np.mean([1 + len(re.findall(r"\bWait\b", c["text"])) for c in completions])


def test_exits_are_shares_of_the_training_completions(finished_run):
    exits = finished_run.result["exits"]
    assert sum(exits.values()) == pytest.approx(1)
    assert set(exits) <= {"natural", "early_exit", "budget", "rep", "eos"}
    for reason, share in exits.items():
        assert share == pytest.approx(np.mean([line[f"exit_{reason}"] for line in finished_run.metrics]))


def test_every_printed_path_exists(finished_run):
    text = finished_run.printed.replace("\n", " ")
    for name, path in {
        "report": finished_run.workdir / "report.html",
        "metrics": finished_run.workdir / "metrics.jsonl",
        "result": finished_run.workdir / "result.json",
        "checkpoint": finished_run.workdir / "checkpoints" / "000002",
        "export": finished_run.workdir / "export",
    }.items():
        assert f"{name}: {path}" in text
        assert path.exists()


def test_closing_table_shows_accuracy_tokens_steps_and_exits(finished_run):
    result = finished_run.result
    for part in ("accuracy (95 % interval)", "tokens, mean", "steps, mean", "exits in training"):
        assert part in finished_run.printed
    for name in ("before", "after"):
        assert f"{result[name]['accuracy']:.1%}" in finished_run.printed
        assert f"{result[name]['tokens']:.1f}" in finished_run.printed


def test_export_is_the_trained_model_and_transformers_loads_it(finished_run):
    exported = finished_run.workdir / "export"
    assert identical(load_params(load_checkpoint(exported)), trained_weights(finished_run.workdir))
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    embedding = model.get_input_embeddings().weight.detach().numpy()
    assert identical(embedding, trained_weights(finished_run.workdir)["embed_VD"])


def test_export_command_on_a_machine_with_one_device_gives_the_same_folder(finished_run, tmp_path):
    one_device = {"XLA_FLAGS": devices_flag(1)}
    out = tmp_path / "out"
    done = command("export", f"--checkpoint={finished_run.workdir}", f"--out={out}", **one_device)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (finished_run.workdir / "export" / name).read_bytes()


def test_training_moves_every_weight_from_the_checkpoint_it_began_with(finished_run):
    """Also the reference of the KL: had it moved along, its buffers would be those of the policy."""
    before, after = trained_weights("builtin:tiny"), trained_weights(finished_run.workdir)
    moved = jax.tree.map(lambda x, y: bool(np.any(np.asarray(x) != np.asarray(y))), before, after)
    assert jax.tree.all(moved)
    assert finished_run.metrics[1]["kl"] > 0


def test_sampler_and_trainer_agree_on_every_logprob(finished_run):
    for line in finished_run.metrics:
        assert 0 < line["sampler_gap"] < 1e-4
        assert line["sampler_gap_rms"] < 1e-4


def test_second_update_of_a_batch_is_off_policy(finished_run):
    """Two updates a batch share the log-probs of the policy that made it."""
    assert all(line["policy_gap"] > 1e-5 for line in finished_run.metrics)


# ---------------------------------------------------------------------- questions


def test_no_training_question_is_evaluated_on(finished_run):
    training = {q.question for q in load_questions(finished_run.config.data)}
    held_out = {c["prompt"] for c in finished_run.completions("before")}
    assert len(held_out) == 16 and not training & held_out


def prompt(*ids: int) -> EncodedPrompt:
    return EncodedPrompt(Question(str(ids), f"question {ids}", "1"), ids)


def test_question_in_both_sets_is_named():
    with pytest.raises(UserError, match=r"config\.eval\.data: 1 questions .* 'question \(3,\)'"):
        assert_disjoint([prompt(1), prompt(2), prompt(3)], [prompt(4), prompt(3)])
    assert_disjoint([prompt(1), prompt(2)], [prompt(3)])


def test_evaluating_on_the_training_split_is_refused(tmp_path):
    config = short_config({"eval": {"data": {"split": "train"}}})
    with pytest.raises(UserError, match=r"config\.eval\.data: 16 questions are also in config\.data"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_steps_walk_through_the_questions_without_repeating_any():
    config, prompts, cursor, seen = short_config(), [prompt(i) for i in range(12)], 0, []
    for _ in range(3):
        batch, cursor = take_prompts(prompts, cursor, config)
        seen += [p.ids for p in batch]
    assert sorted(seen) == sorted(p.ids for p in prompts)


def test_same_question_gets_other_completions_at_the_next_step(tmp_path):
    """A policy that does not move asks the same single question twice."""
    frozen = {"steps": 2, "data": {"count": 1}, "grpo": {"learning_rate": 1e-30}}
    first, second = train(short_config(ONE_STEP, frozen), tmp_path).metrics
    assert first["entropy"] != second["entropy"]
    assert first["kl"] == second["kl"] == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------- stopping and going on


@pytest.fixture(scope="module")
def resumed_run(tmp_path_factory):
    """One step, and then the same command for two; what a crash left behind lies around."""
    workdir = tmp_path_factory.mktemp("resumed_run")
    train(short_config({"steps": 1}), workdir)
    (workdir / "checkpoints" / ".000002.partial" / "params").mkdir(parents=True)
    (workdir / "checkpoints" / "000003" / "params").mkdir(parents=True)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward": 7}\n{"step": 3, "rew')
    return train(short_config({"keep_checkpoints": 1}), workdir)


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished_run, resumed_run):
    assert resumed_run.metrics == finished_run.metrics
    assert all(line["update_norm"] > 0 for line in finished_run.metrics)
    states = [
        checkpoint.load_tree(run.workdir / "checkpoints" / "000002" / "optimizer", optimizer_state(run))
        for run in (finished_run, resumed_run)
    ]
    assert identical(trained_weights(finished_run.workdir), trained_weights(resumed_run.workdir))
    assert identical(*states)
    assert resumed_run.completions("after") == finished_run.completions("after")
    assert resumed_run.result["after"] == finished_run.result["after"]


def optimizer_state(run):
    """The shapes of its optimizer's state, from a fresh one."""
    from step_grpo.main import build_update, optimizer_of

    opened = checkpoint.open_model(run.workdir)
    update = build_update(opened.described.config, run.config, optimizer_of(run.config.grpo), make_mesh(1))
    state = update.init(opened.params)
    return {"step": state.step, "state": state.opt_state}


def test_what_is_recomputed_reaches_the_program_of_the_update():
    from step_grpo.main import build_update, optimizer_of

    cfg = checkpoint.open_model("builtin:tiny").described.config
    row = [Sample(np.array([5, 6]), np.array([7]), 1.0, np.zeros(1, np.float32), np.ones(1, np.float32))]
    packed = stack(pack(row, row_length=8, rows=1), 1)

    def program(remat):
        config = short_config({"model": {"remat": remat}})
        update = build_update(cfg, config, optimizer_of(config.grpo), make_mesh(1))
        return str(jax.make_jaxpr(update.logprobs)(abstract_params(cfg), packed, 1))

    assert program("full") == program("full")
    assert len({program("full"), program("dots"), program("none")}) == 3


def test_disk_that_is_full_costs_nothing_once_there_is_room(finished_run, tmp_path, monkeypatch, capsys):
    """Full as soon as step 2 has its line in metrics.jsonl and is to be written to rollouts.jsonl."""
    with file_system(tmp_path / "disk", "size=64m"):
        workdir, other = tmp_path / "disk" / "run", tmp_path / "disk" / "other"
        shutil.copytree(finished_run.workdir, workdir)  # as it was after its first step
        for name in ("result.json", "export", "checkpoints/000002"):
            path = workdir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

        def fill(*arguments):
            with suppress(OSError), other.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
            return write(*arguments)

        write = RolloutLog.write
        config = short_config({"log": {"rollouts": 16}})  # more than what is left of the file's last page
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(RolloutLog, "write", fill)
            cli.run(lambda: train(config, workdir), ["program"])
        assert ended.value.code == 75
        told = capsys.readouterr().err
        assert re.search(r"^step_grpo: error: .*No space left on device; make room", told, re.M), told
        assert not (workdir / "result.json").exists()
        other.unlink()
        run = train(config, workdir)
        assert run.metrics == finished_run.metrics
        assert {line["step"] for line in read_records(workdir / "rollouts.jsonl")} == {1, 2}
        assert len(read_records(workdir / "rollouts.jsonl")) == 4 + 16
        assert identical(trained_weights(finished_run.workdir), trained_weights(workdir))
        assert run.completions("after") == finished_run.completions("after")
        assert run.result["after"] == finished_run.result["after"]


def test_only_the_newest_checkpoints_are_kept(finished_run, resumed_run):
    assert [p.name for p in checkpoint.saved_steps(finished_run.workdir)] == ["000001", "000002"]
    assert [p.name for p in checkpoint.saved_steps(resumed_run.workdir)] == ["000002"]


def test_checkpoint_knows_step_and_cursor(finished_run):
    for folder, step in zip(checkpoint.saved_steps(finished_run.workdir), (1, 2), strict=True):
        run = checkpoint.read_json(folder / checkpoint.RUN)
        assert (run["step"], run["cursor"]) == (step, 4 * step)
        assert run["data"]["config.data"].startswith("200 prompts with the checksum ")
        assert run["data"]["config.eval.data"].startswith("16 prompts with the checksum ")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"rollout": {"delta": 0.5}}, r"config\.rollout\.delta=0\.95, not 0\.5"),
        ({"seed": 5}, r"config\.seed=0, not 5"),
        ({"rollout": {"triggers": ("Wait", "But")}}, r"config\.rollout\.triggers=\['Wait'\]"),
        ({"eval": {"data": {"count": 17}}}, r"config\.eval\.data\.count=16, not 17"),
    ],
)
def test_going_on_under_other_settings_is_refused_by_name(finished_run, change, field):
    with pytest.raises(UserError, match=f"{field}.*new --workdir"):
        train(short_config({"steps": 3}, change), finished_run.workdir)


# ---------------------------------------------------------------------- the other paths


def test_plain_grpo_never_probes_and_rewards_accuracy_and_format_alone(tmp_path):
    plain = {"rollout": {"exit": "none"}, "reward": {"name": "accuracy"}}
    (line,) = train(short_config(ONE_STEP, plain), tmp_path).metrics
    assert line["probes"] == line["probe_tokens"] == line["forced_tokens"] == 0
    assert line["exit_early_exit"] == line["exit_budget"] == line["exit_rep"] == 0
    assert line["reward"] == pytest.approx(0.9 * line["accuracy"] + 0.1 * line["formatted"])
    assert not any(name.startswith("confidence") for name in line)


@pytest.fixture(scope="module")
def masked_run(tmp_path_factory):
    masked = {
        "prompts_per_step": 2,  # in a single update
        "grpo": {"prompts_per_update": 2, "train_forced_tokens": False, "old_logprobs": "sampler"},
        "reward": {"name": "length_penalty"},
    }
    return train(short_config(ONE_STEP, masked), tmp_path_factory.mktemp("masked_run"))


def test_forced_tokens_are_not_trained_on_where_asked(masked_run):
    (line,) = masked_run.metrics
    assert line["forced_tokens"] > 0
    assert line["trained_tokens"] == 8 * (line["tokens"] - line["forced_tokens"])


def test_forced_tokens_are_trained_on_by_default(finished_run):
    line = finished_run.metrics[0]
    assert line["forced_tokens"] > 0
    assert line["trained_tokens"] == 8 * line["tokens"]  # a mean over two updates of 8 completions each


def test_sampler_logprobs_stand_in_for_the_trainers_where_asked(masked_run):
    (line,) = masked_run.metrics
    assert line["sampler_gap"] == 0  # the old ones are the sampler's
    assert 0 < line["policy_gap"] < 1e-4  # and the trainer's own differ a little


def test_length_penalty_reward_is_the_formula(masked_run):
    (line,) = masked_run.metrics
    correct = line["accuracy"]
    floor = 0.9 * correct * 0.5 + 0.1 * line["formatted"]  # nobody used more than the whole budget
    assert floor <= line["reward"] <= 0.9 * correct + 0.1 * line["formatted"]


def test_number_of_devices_changes_nothing(finished_run, tmp_path):
    """One device here, two there: the same completions, and the same step up to rounding."""
    alone = train(short_config({"steps": 1, "grpo": {"rows": 1}}), tmp_path)
    assert (make_mesh(8, 1).size, make_mesh(8, 2).size) == (1, 2)
    assert alone.completions("before") == finished_run.completions("before")
    there = finished_run.metrics[0]
    for name, value in alone.metrics[0].items():
        if name != "lane_use":  # the only one that speaks of the devices
            assert value == pytest.approx(there[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    ("shared", "devices"), [((128, 16), 8), ((12, 16), 4), ((6,), 6), ((5, 8), 1), ((), 8)]
)
def test_mesh_has_as_many_devices_as_divide_rows_and_lanes(shared, devices):
    assert jax.device_count() == 8
    assert make_mesh(*shared).size == devices


# ---------------------------------------------------------------------- pieces


def scored(*, tokens=3, forced=(), correct=True, formatted=True, steps=1, error=None) -> Scored:
    completion = Completion(
        prompt=0,
        sample=0,
        tokens=np.arange(tokens, dtype=np.int32) + 5,
        logprobs=-np.arange(tokens, dtype=np.float32),
        forced=np.isin(np.arange(tokens), forced),
        reason="natural",
        confidences=np.zeros(0, np.float32),
        probe_tokens=0,
    )
    return Scored(prompt(1, 2), completion, "", Grade(correct, formatted, error), steps)


def test_training_samples_carry_prompt_completion_and_their_own_advantage():
    config = short_config()
    group = [scored(tokens=n) for n in (1, 2, 3, 4)]
    samples = training_samples(group, np.array([[0.5, -1.0], [2.0, 0.0]]), config)
    assert [s.advantage for s in samples] == [0.5, -1.0, 2.0, 0.0]
    for s, source in zip(samples, group, strict=True):
        assert s.prompt_ids.tolist() == [1, 2]
        assert s.completion_ids.tolist() == source.completion.tokens.tolist()
        assert s.sampler_logprobs.tolist() == source.completion.logprobs.tolist()


@pytest.mark.parametrize(("train_forced", "mask"), [(True, [1, 1, 1, 1]), (False, [1, 0, 0, 1])])
def test_forced_tokens_are_masked_where_asked(train_forced, mask):
    config = short_config({"grpo": {"train_forced_tokens": train_forced}})
    (sample,) = training_samples([scored(tokens=4, forced=(1, 2))], np.zeros((1, 1)), config)
    assert sample.loss_mask.tolist() == mask


def test_every_completion_needs_an_advantage():
    with pytest.raises(ValueError):
        training_samples([scored(), scored()], np.zeros((1, 1)), short_config())


def test_step_aware_rewards_are_grouped_by_prompt():
    """Restated from Eq. 4 and 5, on two groups of two with a mean of their own each."""
    config = short_config({"rollout": {"samples": 2}, "reward": {"alpha": 0.8, "beta": 0.4}})
    rows = [
        scored(steps=1),
        scored(steps=3),
        scored(steps=5, correct=False),
        scored(steps=9, correct=False, formatted=False),
    ]
    expected = [
        [0.8 * (1 - 0.4 * np.tanh(-0.5)) + 0.2, 0.8 * (1 - 0.4 * np.tanh(0.5)) + 0.2],
        [0.2, 0.0],
    ]
    np.testing.assert_allclose(reward_groups(rows, config), expected)


def test_length_penalty_counts_the_tokens_of_the_completion():
    config = short_config(
        {"rollout": {"samples": 2, "max_response_tokens": 100}},
        {"reward": {"name": "length_penalty", "length_penalty": 0.5}},
    )
    rows = [scored(tokens=100), scored(tokens=20, correct=False)]
    np.testing.assert_allclose(reward_groups(rows, config), [[0.9 * 0.5 + 0.1, 0.1]])


def test_grpo_lambda_penalises_the_groups_that_are_mostly_correct():
    config = short_config(
        {"rollout": {"samples": 2, "max_response_tokens": 100}},
        {"reward": {"name": "grpo_lambda", "length_penalty": 0.5, "penalty_from": 1.0}},
    )
    rows = [scored(tokens=100), scored(tokens=20), scored(tokens=100), scored(tokens=20, correct=False)]
    np.testing.assert_allclose(reward_groups(rows, config), [[0.55, 0.91], [1.0, 0.1]])


# One group of three; what each setting makes of it, by Eq. 4 and 5.
GROUP = ({"steps": 1}, {"steps": 3}, {"steps": 8, "correct": False})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [0.9 * (1 + 0.5 * np.tanh(0.5)) + 0.1, 0.9 * (1 - 0.5 * np.tanh(0.5)) + 0.1, 0.1]),
        ({"beta": 0.0}, [1.0, 1.0, 0.1]),
        ({"beta": 1.0}, [0.9 * (1 + np.tanh(0.5)) + 0.1, 0.9 * (1 - np.tanh(0.5)) + 0.1, 0.1]),
        (
            {"baseline": "all"},  # the mean is 4, not 2
            [0.9 * (1 + 0.5 * np.tanh(0.75)) + 0.1, 0.9 * (1 + 0.5 * np.tanh(0.25)) + 0.1, 0.1],
        ),
        ({"alpha": 1.0}, [1 + 0.5 * np.tanh(0.5), 1 - 0.5 * np.tanh(0.5), 0.0]),
        ({"name": "accuracy"}, [1.0, 1.0, 0.1]),
    ],
)
def test_each_ablation_of_the_reward_is_one_setting(change, expected):
    config = short_config({"rollout": {"samples": 3}, "reward": change})
    np.testing.assert_allclose(reward_groups([scored(**row) for row in GROUP], config), [expected])


def score_texts(texts, triggers=("Wait",), **asked):
    """`score_completions` of one prompt's completions with these texts, by a grader that finds all right."""

    class Tokenizer:
        def decode(self, tokens, skip_special_tokens):
            return texts[int(tokens[0])]

    class EveryAnswerIsRight:
        def grade_many(self, texts, answers, kinds=None):
            return [Grade(True, True, None) for _ in texts]

    made = [
        dataclasses.replace(scored().completion, sample=i, tokens=np.array([i])) for i in range(len(texts))
    ]
    return score_completions(Tokenizer(), [prompt(1)], made, EveryAnswerIsRight(), triggers, **asked)


@pytest.mark.parametrize(
    ("triggers", "steps"), [(("Wait",), [2, 1]), (("Wait", "But"), [3, 2]), (("Hmm",), [1, 1])]
)
def test_triggers_are_what_opens_a_step_in_the_reward(triggers, steps):
    found = score_texts(["7. Wait, no. But yes.", "But 7."], triggers)
    assert [s.steps for s in found] == steps
    config = short_config({"rollout": {"samples": 2, "triggers": triggers}})
    (reward,) = reward_groups(found, config)
    assert (reward[0] < reward[1]) == (steps[0] > steps[1])


@pytest.mark.parametrize(
    ("text", "formatted"),
    [
        (r"<think>\n3+4=7.\n</think>\n\nThe answer is \boxed{7}.", True),
        (r"3+4=7.\n</think>\n\n\boxed{7}", True),  # opened by the prompt
        (r"<think>\n3+4=7.\n\nThe answer is \boxed{7}.", False),
        (r"<think>\n\boxed{7}\n</think>\n\nThe answer is seven.", False),
        (r"<think>\n\boxed{7}\n</think>\n\n\boxed{7", False),
        (r"\boxed{7}", False),
    ],
)
def test_format_may_ask_for_a_box_behind_a_closed_thinking(text, formatted):
    assert [s.grade for s in score_texts([text], closed_thinking=True)] == [Grade(True, formatted, None)]
    assert [s.grade for s in score_texts([text])] == [Grade(True, True, None)]


@pytest.mark.parametrize("module", ["step_grpo.evaluate", "step_grpo.main"])
def test_evaluation_and_rollouts_ask_for_the_format_of_the_config(module, tmp_path, monkeypatch):
    class AskedError(Exception):
        pass

    def asked(*args, closed_thinking):
        raise AskedError(f"closed_thinking={closed_thinking}")

    monkeypatch.setattr(f"{module}.score_completions", asked)
    config = short_config({"reward": {"closed_thinking": True}})  # evaluated before it is trained
    with pytest.raises(AskedError, match="closed_thinking=True"):
        train(config, tmp_path)


def test_samples_of_an_update_are_weighted_by_what_the_loss_is_a_mean_over():
    samples = training_samples([scored(tokens=n) for n in (1, 3)], np.zeros((1, 2)), short_config())
    expected = {"token": [1, 1], "sequence": [4 / (2 * 1), 4 / (2 * 3)], "constant": [4 / (2 * 160)] * 2}
    for loss_mean, weights in expected.items():
        config = short_config({"grpo": {"loss_mean": loss_mean}})
        assert [s.weight for s in weighted(samples, config)] == pytest.approx(weights)


# ---------------------------------------------------------------------- dynamic sampling


def dynamic_config(rounds: int):
    return short_config({"rollout": {"samples": 2}, "grpo": {"dynamic_sampling": rounds}})


def rolls(mixed_every: int, calls: list):
    """Two samples of each of four prompts; every so-manieth prompt from the first has a mixed group."""

    def roll_out(cursor, key):
        calls.append((cursor, jax.random.key_data(key).tolist()))
        groups = [
            [scored(), scored(correct=number % mixed_every != 0, steps=number + 1)]
            for number in range(cursor, cursor + 4)
        ]
        stats = RolloutStats(seconds=2.0, steps=5)
        return Sampled([s for group in groups for s in group], stats, cursor + 4)

    return roll_out


@pytest.mark.parametrize(
    ("mixed_every", "most", "rounds", "kept"),
    [
        (1, 0, 1, 4),  # off: one round, and all of it
        (100, 0, 1, 4),
        (1, 3, 1, 4),  # all mixed: one round is enough
        (2, 3, 2, 4),
        (3, 9, 3, 4),  # 0, 3, 6, 9
        (3, 2, 2, 3),  # not as many as wanted within the rounds
        (3, 1, 1, 2),  # what is not mixed is dropped, and none are drawn in its place
    ],
)
def test_rounds_go_on_until_enough_groups_are_mixed(mixed_every, most, rounds, kept):
    config, calls = dynamic_config(most), []
    scored_, stats, cursor = sample_groups(rolls(mixed_every, calls), 0, jax.random.key(3), config)
    assert cursor == 4 * rounds and len(scored_) == 8 * rounds
    assert (stats.seconds, stats.steps) == (2.0 * rounds, 5 * rounds)
    assert [at for at, _ in calls] == [4 * number for number in range(rounds)]
    samples = training_samples(scored_, np.arange(8 * rounds).reshape(-1, 2), config)
    trained = trained_groups(samples, scored_, config)
    groups = [int(s.advantage) // 2 for s in trained[::2]]
    assert groups == (list(range(4)) if most == 0 else [mixed_every * i for i in range(kept)])
    assert [s.advantage for s in trained] == [2 * g + i for g in groups for i in range(2)]
    figures = sampling_figures(scored_, trained, config)
    assert figures == ({"rounds": rounds, "trained_groups": kept} if most else {})


def test_first_round_is_that_of_a_run_without_dynamic_sampling_and_others_have_keys_of_their_own():
    plain, dynamic = [], []
    sample_groups(rolls(9, plain), 5, jax.random.key(3), dynamic_config(0))
    sample_groups(rolls(9, dynamic), 5, jax.random.key(3), dynamic_config(3))
    assert dynamic[0] == plain[0]
    assert len({str(key) for _, key in dynamic}) == len(dynamic) == 3


def test_step_with_no_mixed_group_makes_no_update():
    config = dynamic_config(2)
    found = sample_groups(rolls(100, []), 1, jax.random.key(3), config)
    samples = trained_groups(training_samples(found.scored, np.zeros((8, 2)), config), found.scored, config)
    assert samples == []
    nothing = Update(init=None, start=None, logprobs=None, accumulate=None, apply=None)
    state = object()
    after, measured = update_policy(nothing, state, Frozen(None, None, None), samples, config, make_mesh(1))
    assert after is state
    names = {*Measurements._fields, "skipped_updates"} - {"skipped"}
    assert measured == dict.fromkeys(names, 0.0)


def test_gradients_of_an_update_are_gone_before_those_of_the_next_are_made():
    """They are as large as the params, and the fit check counts them once."""
    made, left = [], []

    def start(params):
        left.append(sum(grads() is not None for grads in made))
        grads = jax.numpy.zeros_like(params)
        made.append(weakref.ref(grads))
        return grads, None

    def apply(state, grads, sums):
        zeros = dict.fromkeys(Measurements._fields, np.float32(0))
        return state, Measurements(**zeros)

    update = Update(
        init=None,
        start=start,
        logprobs=lambda params, packed, count, frozen: TokenLogprobs(packed.mask, packed.mask),
        accumulate=lambda params, grads, sums, batch, count, frozen: (grads, sums),
        apply=apply,
    )
    config = short_config({"grpo": {"prompts_per_update": 1, "old_logprobs": "sampler"}})
    count = config.rollout.samples
    samples = training_samples([scored()] * 3 * count, np.zeros((3, count)), config)
    state = TrainState(np.int32(0), jax.numpy.ones(3), None)
    update_policy(update, state, Frozen(None, None, None), samples, config, make_mesh(1))
    assert left == [0, 0, 0]


def test_times_of_a_stage_that_comes_again_add_up():
    clock = Stopwatch()
    clock._since -= 10
    clock.lap("a")
    clock._since -= 5
    clock.lap("a")
    assert 15 <= clock.laps["a"] < 16


def test_standard_error_is_that_of_the_prompts_means():
    """Completions of one prompt that are all alike say no more than one of them."""
    rng = np.random.default_rng(0)
    once = rng.normal(size=(50, 1))
    assert standard_error(np.repeat(once, 8, axis=1)) == pytest.approx(standard_error(once))
    assert standard_error(once) == pytest.approx(np.sqrt(np.var(once, ddof=1) / 50))
    assert np.isnan(standard_error(np.ones((1, 4))))


def test_answer_that_could_not_be_graded_counts_as_wrong():
    config = short_config({"rollout": {"samples": 2}, "reward": {"name": "accuracy"}})
    rows = [scored(), scored(correct=False, formatted=False, error="deadline")]
    np.testing.assert_allclose(reward_groups(rows, config), [[1.0, 0.0]])


def test_exit_shares_are_averaged_over_steps_and_absent_reasons_left_out():
    reasons = ("unfinished", "natural", "early_exit", "budget", "rep", "eos", "length")
    empty = {f"exit_{reason}": 0.0 for reason in reasons}
    lines = [empty | {"exit_natural": 1.0}, empty | {"exit_natural": 0.5, "exit_rep": 0.5}]
    assert mean_exits(lines) == {"natural": 0.75, "rep": 0.25}


HALF = Confidence(question=(1,), max_notes=4, delta=0.5, strict=True, early_abort=True)


def test_confidence_figures_are_percentiles():
    values = np.linspace(0, 1, 101).astype(np.float32)
    figures = confidence_figures(values, HALF)
    assert list(figures.values()) == pytest.approx([0.1, 0.5, 0.9, 1.0, 50 / 101], abs=1e-6)
    assert confidence_figures(values[:0], HALF) == {}


def test_what_alters_no_result_may_change_when_a_run_goes_on():
    saved = short_config().to_dict()
    freed = short_config(
        {"steps": 9, "rollout": {"lanes": 2}, "reward": {"grading_workers": 1}, "keep_checkpoints": 7},
        {"log": {"rollouts": 0}},
    )
    checkpoint.check_same_run(saved, freed.to_dict(), Path("a run"))
