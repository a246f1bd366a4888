import ast
import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import step_grpo
from step_grpo.cli import leaf_fields, load_config
from step_grpo.config import base_config, sft_config, validate, validate_sft
from step_grpo.data.sources import load_questions
from step_grpo.errors import UserError

ROOT = Path(__file__).parents[1]
REAL = sorted([*ROOT.glob("configs/qwen3_*.py"), *ROOT.glob("configs/r1_distill_*.py")])
# sft and study configs have fields of their own
RUNS = sorted([*REAL, ROOT / "configs/tiny.py", ROOT / "configs/study_run.py"])

# METHOD, section 4 and the defaults of sections 1 to 3
PAPER = {
    "steps": 100,
    "prompts_per_step": 512,
    "grpo.prompts_per_update": 128,
    "rollout.samples": 5,
    "rollout.delta": 0.95,
    "rollout.max_prompt_tokens": 2048,
    "rollout.max_response_tokens": 16384,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.triggers": ("Wait",),
    "rollout.inducing_prompt": "\n**Final Answer**\n\\boxed",
    "rollout.think_ratio": 0.9,
    "rollout.max_probes": 10,
    "rollout.max_probe_tokens": 20,
    "rollout.budget_margin": 50,
    "rollout.max_repetitions": 3,
    "reward.alpha": 0.9,
    "reward.beta": 0.5,
    "grpo.learning_rate": 1e-6,
    "grpo.b1": 0.9,
    "grpo.b2": 0.999,
    "grpo.weight_decay": 1e-2,
    "grpo.grad_clip": 1.0,
    "grpo.clip_low": 0.2,
    "grpo.clip_high": 0.3,
    "grpo.dual_clip": 3.0,
    "grpo.kl_coef": 1e-2,
    "eval.temperature": 0.6,
    "eval.top_p": 0.95,
    "data.instruction": " Please reason step by step, and put your final answer within \\boxed{}.",
}


def get(config: ConfigDict, path: str):
    for name in path.split("."):
        config = config[name]
    return config


def changed(fields: dict) -> ConfigDict:
    config = base_config()
    config.update_from_flattened_dict(fields)
    return config


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_config_loads_locked_and_valid(path):
    config = load_config(str(path))
    validate(config)
    assert config.is_locked and config.rollout.is_locked and config.data.is_locked
    with pytest.raises(UserError, match=r"(unknown|takes no) argument.* 'typo'"):
        load_config(f"{path}:typo")


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_config_has_the_papers_settings(path):
    config = load_config(str(path))
    sizes = ("prompts_per_step", "grpo.prompts_per_update", "rollout.max_prompt_tokens")
    smaller = (*sizes, "rollout.max_response_tokens") if path.stem.endswith("colab") else ()
    expected = {field: value for field, value in PAPER.items() if field not in smaller}
    assert {field: get(config, field) for field in expected} == expected
    assert config.rollout.strict == path.stem.startswith("qwen3")


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
@pytest.mark.parametrize("data", ["/some/folder", None])
def test_runlocal_is_valid_small_and_of_the_same_family(path, data, monkeypatch):
    if data:
        monkeypatch.setenv("STEP_GRPO_TEST_DATA", data)
    else:
        monkeypatch.delenv("STEP_GRPO_TEST_DATA", raising=False)
    full, small = load_config(str(path)), load_config(f"{path}:runlocal")
    validate(small)
    assert small.is_locked and small.data.is_locked
    family = "qwen3" if path.stem.startswith("qwen3") else "qwen2"
    assert small.model.architecture.model_type == family
    assert small.model.architecture.hidden_size <= 64 and small.model.architecture.num_hidden_layers == 2
    assert small.steps == 2 and small.model.dtype == "float32"
    assert small.model.tokenizer == ("/some/folder/qwen3_tokenizer" if data else full.model.checkpoint)
    assert small.data.name == ("/some/folder/benchmarks/gsm8k.jsonl" if data else "openai/gsm8k")
    assert small.eval.data.split == "test"
    # what the method is stays as it is
    for field in ("exit", "delta", "strict", "triggers", "inducing_prompt"):
        assert small.rollout[field] == full.rollout[field]
    assert small.reward == full.reward


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_runlocal_reads_the_questions_of_the_folder(path, tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    for name in ("gsm8k", "math"):
        row = {"problem": f"A question of {name}?", "answer": "3"}
        (tmp_path / "benchmarks" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("STEP_GRPO_TEST_DATA", str(tmp_path))
    small = load_config(f"{path}:runlocal")
    for data in (small.data, small.eval.data):
        assert [question.answer for question in load_questions(data)] == ["3"]


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_runlocal_architecture_makes_a_checkpoint_of_its_family(family):
    weights = pytest.importorskip("step_grpo.model.weights")
    name = {"qwen3": "qwen3_8b", "qwen2": "r1_distill_qwen_7b"}[family]
    config = load_config(f"{ROOT / 'configs' / name}.py:runlocal")
    hf_config, params = weights.random_checkpoint(config.model.architecture.to_dict(), seed=0)
    assert hf_config["model_type"] == family
    assert params["embed_VD"].shape == (151936, 32)
    assert params["layers"]["wq_DNH"].shape == (2, 32, 4, 8)


def test_every_field_is_read_by_the_program():
    read = set()
    for path in Path(step_grpo.__file__).parent.rglob("*.py"):
        if path.name != "config.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unread = [field for field in leaf_fields(base_config()) if field.rpartition(".")[2] not in read]
    assert not unread, f"config fields that nothing reads: {unread}"


WRONG = {
    **{f"mesh.{axis}": -1 for axis in ("data", "fsdp", "tensor")},
    "seed": -1,
    "steps": 0,
    "prompts_per_step": 0,
    "save_every": 0,
    "keep_checkpoints": 0,
    "keep_every": -1,
    **{f"warn.{bound}": -0.5 for bound in ("kl", "sampler_gap", "length", "truncated")},
    "log.rollouts": -1,
    "export_dtype": "int8",
    "model.dtype": "float64",
    "model.attention": "flash",
    "model.remat": "everything",
    "model.checkpoint": "",
    "lora.rank": -1,
    "lora.alpha": 0.0,
    "lora.targets": ("q_proj", "lm_head"),
    "lora.base": "int8",
    "data.source": "csv",
    "data.name": "",
    "data.bad_rows": "ignore",
    "data.prompt_column": "a..b",
    "data.answer_column": "",
    "eval.data.source": "csv",
    "rollout.samples": 1,
    "rollout.lanes": -1,
    "rollout.cache_dtype": "int4",
    "rollout.max_prompt_tokens": 0,
    "rollout.max_response_tokens": 0,
    "rollout.temperature": 0.0,
    "rollout.top_k": -1,
    "rollout.top_p": 0.0,
    "rollout.min_p": 1.5,
    "rollout.exit": "confident",
    "rollout.delta": 1.01,
    "rollout.sufficiency.threshold": 101.0,
    "rollout.sufficiency.min_gap": -1,
    "rollout.sufficiency.question": "",
    "rollout.verifier.threshold": -0.1,
    "rollout.verifier.delimiters": (),
    "rollout.verifier.question": "",
    "rollout.yes_words": (),
    "rollout.no_words": ("",),
    "rollout.triggers": (),
    "rollout.inducing_prompt": "",
    "rollout.think_ratio": 1.5,
    "rollout.max_probes": -1,
    "rollout.max_probe_tokens": 1,
    "rollout.budget_margin": -1,
    "rollout.max_repetitions": 0,
    "reward.name": "steps",
    "reward.functions": ("my_module.mine",),
    "log.metrics": ("my module:mine",),
    "reward.alpha": 1.1,
    "reward.beta": -0.1,
    "reward.baseline": "none",
    "reward.length_penalty": 1.5,
    "reward.penalty_from": 1.5,
    "reward.grading_workers": 0,
    "reward.grading_deadline": 0.0,
    "grpo.prompts_per_update": 100,
    "grpo.advantage": "gae",
    "grpo.loss_mean": "median",
    "grpo.dynamic_sampling": -1,
    "grpo.learning_rate": float("nan"),
    "grpo.b1": 1.0,
    "grpo.b2": -0.1,
    "grpo.weight_decay": -1.0,
    "grpo.grad_clip": 0.0,
    "grpo.moments_dtype": "int8",
    "grpo.clip_low": 1.0,
    "grpo.clip_high": float("inf"),
    "grpo.ratio": "completion",
    "grpo.sequence_clip_low": 1.0,
    "grpo.sequence_clip_high": 0.0,
    "grpo.dual_clip": 1.0,
    "grpo.kl_coef": -1.0,
    "grpo.old_logprobs": "rollout",
    "grpo.max_skipped": 0,
    "grpo.row_length": 18431,
    "grpo.rows": -1,
    "grpo.logprob_chunk": 0,
    "eval.questions": -1,
    "eval.benchmark_questions": -1,
    "eval.samples": 0,
    "eval.exit": "deer",
    "verifier_training.prefixes": 0,
    "verifier_training.epochs": 0,
    "verifier_training.learning_rate": 0.0,
    "verifier_training.rows": -1,
    "imitation.epochs": 0,
    "imitation.learning_rate": 0.0,
    "imitation.rows": -1,
    "data.grading": "human",
    "data.choice_columns": ("",),
    "eval.temperature": -0.1,
    "eval.top_k": -2,
    "eval.top_p": 1.1,
    "eval.min_p": -0.5,
    "eval.max_response_tokens": 0,
}


@pytest.mark.parametrize("field", WRONG)
def test_wrong_value_names_field_and_value(field):
    with pytest.raises(UserError) as caught:
        validate(changed({field: WRONG[field]}))
    assert f"config.{field} " in str(caught.value)
    if WRONG[field] != "":
        assert str(WRONG[field]) in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("steps", None, "a whole number"),
        ("steps", 2.5, "a whole number"),
        ("rollout.rebatch", "yes", "True or False"),
        ("grpo.learning_rate", "small", "a number"),
        ("data.name", 3, "a text"),
        ("data.instruction", "\ud800", "a text"),
        ("rollout.triggers", "Wait", "a tuple of texts"),
        ("lora.targets", (["q_proj"],), "a tuple of texts"),
        ("eval.data", None, "a group of fields"),
    ],
)
def test_value_of_a_wrong_type_names_field_value_and_type(field, value, right):
    config = base_config().unlock()
    *groups, name = field.split(".")
    parent = get(config, ".".join(groups)) if groups else config
    with parent.ignore_type():
        parent[name] = value
    with pytest.raises(UserError) as caught:
        validate(config)
    assert str(caught.value).startswith(f"config.{field} is {value!r}; it must be {right}")


def test_missing_field_is_named():
    config = base_config().unlock()
    del config.grpo["b1"]
    with pytest.raises(UserError, match=r"config\.grpo\.b1 is missing"):
        validate(config)


# Texts that may be anything, switches, and fields with a rule of their own below.
FREE = {
    *(f"{data}.{name}" for data in ("data", "eval.data") for name in ("subset", "split", "answer_pattern")),
    *(f"{data}.{name}" for data in ("data", "eval.data") for name in ("instruction", "count", "seed")),
    *(f"eval.data.{name}" for name in ("name", "bad_rows", "prompt_column", "answer_column")),
    *(f"eval.data.{name}" for name in ("grading", "choice_columns")),
    *(
        "keep_best",
        "model.tokenizer",
        "model.architecture",
        "rollout.strict",
        "rollout.early_abort",
        "rollout.rebatch",
        "rollout.verifier.checkpoint",
        "rollout.verifier.prefix",
        "grpo.train_forced_tokens",
        "reward.closed_thinking",
        "log.wandb",
        "log.tensorboard",
    ),
}


def test_every_constrained_field_has_a_wrong_value_above():
    assert set(leaf_fields(base_config())) == set(WRONG) | FREE


def test_checkpoint_and_architecture_exclude_each_other():
    architecture = {"model_type": "qwen3"}
    config = base_config()
    config.model.architecture = ConfigDict(architecture)
    with pytest.raises(UserError, match="are both set"):
        validate(config)
    config.model.checkpoint = ""
    with pytest.raises(UserError, match=r"config\.model\.tokenizer"):
        validate(config)
    config.model.tokenizer = "folder"
    validate(config)
    config.model.architecture = ConfigDict({"model_type": "llama"})
    with pytest.raises(UserError, match=r"architecture\.model_type is 'llama'"):
        validate(config)


def test_generated_problems_need_a_count_and_no_name():
    validate(changed({"data.source": "arithmetic", "data.name": ""}))
    with pytest.raises(UserError, match=r"config\.data\.count is 0"):
        validate(changed({"data.source": "arithmetic", "data.count": 0}))
    with pytest.raises(UserError, match=r"config\.data\.seed is -1"):
        validate(changed({"data.source": "arithmetic", "data.seed": -1}))


def test_families_of_problems_are_named():
    validate(changed({"data.source": "tasks", "data.name": "chains, search"}))
    with pytest.raises(UserError, match=r"config\.data\.name is 'sums'; .* chains, equations, search"):
        validate(changed({"data.source": "tasks", "data.name": "sums"}))
    with pytest.raises(UserError, match=r"config\.eval\.data\.count is 0"):
        validate(changed({"eval.data.source": "reasoning_gym", "eval.data.count": 0}))


def test_verifier_needs_a_checkpoint():
    with pytest.raises(UserError, match=r"config\.rollout\.verifier\.checkpoint is ''"):
        validate(changed({"rollout.exit": "verifier"}))
    validate(changed({"rollout.exit": "verifier", "rollout.verifier.checkpoint": "builtin:tiny"}))


def test_one_text_is_no_tuple_of_texts():
    with pytest.raises(UserError, match=r"config\.rollout\.verifier\.delimiters is '\\n\\n'"):
        config = base_config().unlock()
        config.rollout.verifier = ConfigDict({**config.rollout.verifier.to_dict(), "delimiters": "\n\n"})
        validate(config)


def test_greedy_evaluation_is_allowed():
    validate(changed({"eval.temperature": 0.0}))


WRONG_SFT = {
    "tasks": "chains,sums",
    "steps": 100,  # no more than the warm-up
    "rows": 0,
    "row_length": 0,
    "learning_rate": 0.0,
    "warmup_steps": -1,
    "habits.least_checks": -1,
    "habits.check_on": 1.1,
    "habits.impatient": -0.1,
    "habits.carelessness": 0.0,
    "b1": 1.0,
    "grad_clip": -1.0,
    "log_every": 0,
    "moments_dtype": "float16",
    "dtype": "int8",
    "remat": "",
    "export_dtype": "int8",
}


@pytest.mark.parametrize("field", WRONG_SFT)
def test_wrong_value_of_a_fine_tuning_is_named(field):
    config = sft_config().unlock()
    config.update_from_flattened_dict({field: WRONG_SFT[field]})
    with pytest.raises(UserError, match=rf"config\.{re.escape(field)} is "):
        validate_sft(config)


@pytest.mark.parametrize("name", ["tiny_sft", "study_sft"])
def test_shipped_fine_tuning_is_valid(name):
    validate_sft(load_config(str(ROOT / "configs" / f"{name}.py")))
