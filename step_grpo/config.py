"""The one config system: every field, its paper default, and the checks that name a wrong value.

`base_config` holds the settings of the paper (METHOD: arXiv 2604.16890); each file of `configs/` is a few
lines over it. Configs are locked, so a mistyped field is an error and not a silent default.
"""

import math
import numbers
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from step_grpo.data.arithmetic import Habits
from step_grpo.data.tasks import families
from step_grpo.errors import UserError
from step_grpo.grpo import advantages
from step_grpo.grpo.loss import LOSS_MEANS
from step_grpo.grpo.settings import RATIOS
from step_grpo.mesh import AXES
from step_grpo.reward import rewards

GENERATED = ("arithmetic", "tasks", "reasoning_gym")  # sources of questions
EXITS = ("confidence", "sufficiency", "verifier", "none")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def data_config(**fields) -> ConfigDict:
    """Where questions come from; `fields` replace the defaults.

    source: `hf`, `tfds`, `jsonl`, `parquet`, or generated: `arithmetic`, `tasks`, `reasoning_gym`;
    name: Hub name, TFDS name, or path; for `tasks` some of `chains,equations,search` (mixed evenly), for
    `reasoning_gym` its name of the dataset;
    prompt_column and answer_column take dotted paths (`reward_model.ground_truth`, `prompt.0.content`);
    answer_pattern: regex whose first group is the answer (empty: the whole column);
    choice_columns: the wrong options of a multiple-choice question, whose right one is the answer column: all
    are put behind the question in an order of its own, and the answer is a letter (empty: no options to add);
    grading: `math`, by value; `choice`, the letter of an option; `exact`, options, words, lists and numbers;
    instruction: appended to the trimmed question; bad_rows: `error` or `drop`;
    count: problems to generate, where they are generated; seed: of which draw. Splits of those are `train`,
    `validation`, `test`, and of `tasks` also `ood`: harder ones, of a kind that training never sees. A
    question is of the same split in every draw.
    """
    config = ConfigDict(
        {
            "source": "hf",
            "name": "",
            "subset": "",
            "split": "train",
            "prompt_column": "problem",
            "answer_column": "answer",
            "answer_pattern": "",
            "choice_columns": (),
            "grading": "math",
            "instruction": " Please reason step by step, and put your final answer within \\boxed{}.",
            "bad_rows": "error",
            "count": 10_000,
            "seed": 0,
        }
    )
    config.update(fields)
    return config.lock()


def base_config() -> ConfigDict:
    """The paper's run: Qwen3-8B on DAPO-Math-17k (METHOD, section 4)."""
    run = {
        "seed": 0,
        "steps": 100,  # rollout batches
        "prompts_per_step": 512,
        "save_every": 10,  # steps between checkpoints
        "keep_checkpoints": 3,  # the last so many
        "keep_every": 0,  # and those of every so-manieth step; 0: none
        "keep_best": "",  # and the one best by this metric, `-tokens` where less is better; empty: none
        "export_dtype": "bfloat16",
    }
    model = {
        "checkpoint": "Qwen/Qwen3-8B",  # folder, Hub name, or `builtin:tiny`; empty: random weights
        "tokenizer": "",  # folder or Hub name; empty: the checkpoint's own
        "architecture": {},  # fields of a HF config.json, for random weights only
        "dtype": "bfloat16",  # of the compute; master weights are float32
        "attention": "auto",  # by platform; or `xla`, `pallas` (TPU), `cudnn` (GPU)
        # What the backward pass computes anew: `full`, whole layers; `dots`, all but products with weights,
        # which costs memory and saves time; `none`, nothing.
        "remat": "full",
    }
    # Devices along each axis; one of them may be 0: all that the other two leave. `data` copies the weights,
    # `fsdp` spreads them, `tensor` spreads the heads and the vocabulary of one row and stays within a host.
    mesh = {"data": 1, "fsdp": 0, "tensor": 1}
    # The original upload holds each question a hundred times, wrapped in an instruction of its own that
    # asks for another answer format; this copy holds the bare questions, once.
    data = data_config(
        name="open-r1/DAPO-Math-17k-Processed", subset="all", prompt_column="prompt", answer_column="solution"
    )
    rollout = {
        "samples": 5,  # G, completions a prompt
        "lanes": 0,  # completions in hand at a time; 0: as many as the devices' free memory holds
        "rebatch": True,  # refill lanes at once and pack them; False: static batches, to see what that saves
        "cache_dtype": "",  # the model's; or `int8`: half the memory, keys and values rounded
        "max_prompt_tokens": 2048,
        "max_response_tokens": 16384,
        "temperature": 1.0,
        "top_k": 0,  # most probable tokens that may be drawn; 0: all
        "top_p": 1.0,
        "min_p": 0.0,  # least probability, as a share of the largest one; 0: any
        # What ends the thinking: `confidence` in a tentative answer, `sufficiency` as the model itself sees
        # it, a `verifier`, or `none` of them: plain sampling.
        "exit": "confidence",
        "delta": 0.95,
        "strict": True,
        # End a probe once it cannot exit any more. Decisions stay the same; the confidences of such probes
        # are those of the answer so far, not above delta.
        "early_abort": True,
        "sufficiency": {
            "threshold": 100.0,  # of the score, 0 to 100
            "min_gap": 64,  # tokens between two checks
            "question": "\n\nIs the reasoning so far sufficient to derive the correct final answer? "
            "Answer (Yes or No):",
        },
        "verifier": {
            "checkpoint": "",  # folder, Hub name, or `builtin:tiny`, with the model's vocabulary
            "threshold": 0.5,  # of the probability of yes against no
            "delimiters": ("\n\n",),
            "prefix": "",  # what the verifier reads before the prompt
            "question": "\n\nIs the reasoning so far sufficient to derive the correct final answer? "
            "Answer (Yes or No):",
        },
        "yes_words": ("yes", "Yes", "YES", " yes", " Yes", " YES"),
        "no_words": ("no", "No", "NO", " no", " No", " NO"),
        "triggers": ("Wait",),
        "inducing_prompt": "\n**Final Answer**\n\\boxed",
        "think_ratio": 0.9,
        "max_probes": 10,
        "max_probe_tokens": 20,
        "budget_margin": 50,  # a probe this close to the thinking budget ends the thinking
        "max_repetitions": 3,
    }
    lora = {
        # Train an adapter of this rank and leave the weights as they are; 0: train all weights. An adapter
        # takes about ten times the learning rate (config.grpo.learning_rate), and far less memory: the
        # weights have no gradients and no optimizer state.
        "rank": 0,
        "alpha": 32.0,  # the adapter counts alpha / rank times
        "targets": LORA_TARGETS,
        # The frozen weights: `dense`, in the type of the compute, or rounded to `int8`, `int4` or `nf4`
        # (QLoRA). Rounded, they need a half or a quarter of the memory, and the rollout is slower.
        "base": "dense",
    }
    reward = {
        # Or `accuracy`, `length_penalty`, `grpo_lambda`, `kimi_length`; `none`, functions alone.
        "name": "step_aware",
        "functions": (),  # your own, as "module:function", added to it (docs/your_own.md)
        "alpha": 0.9,
        # The reward for the format asks for a closed box; if set, for one behind a closed thinking.
        "closed_thinking": False,
        "beta": 0.5,
        "baseline": "correct",  # or `all`
        "length_penalty": 0.5,
        "penalty_from": 0.5,  # least share of correct completions in a group for `grpo_lambda`'s penalty
        "grading_workers": 2,
        "grading_deadline": 5.0,  # seconds an answer
    }
    grpo = {
        "prompts_per_update": 128,
        "advantage": "grpo",  # or `dr_grpo`, not divided by the std; `rloo`, against the mean of the others
        # What the loss is a mean over: `token`, the tokens of the update; `sequence`, each completion's
        # tokens, then completions; `constant`, completions times max_response_tokens.
        "loss_mean": "token",
        # Roll out prompts up to so many times, until prompts_per_step groups have both right and wrong
        # completions; only these are trained on. 0: train on all groups.
        "dynamic_sampling": 0,
        "learning_rate": 1e-6,
        "b1": 0.9,
        "b2": 0.999,
        "weight_decay": 1e-2,
        "grad_clip": 1.0,
        "moments_dtype": "float32",  # of AdamW's state; or `bfloat16`: half its memory
        "clip_low": 0.2,
        "clip_high": 0.3,
        "ratio": "token",  # whose likelihood ratio is clipped; or `sequence` (GSPO), with a range of its own
        "sequence_clip_low": 3e-4,
        "sequence_clip_high": 4e-4,
        "dual_clip": 3.0,
        "kl_coef": 1e-2,
        "old_logprobs": "trainer",  # or `sampler`
        "train_forced_tokens": True,
        "max_skipped": 5,  # updates in a row that are not finite, before the run stops
        "row_length": 18432,  # tokens a packed row
        "rows": 0,  # packed rows a micro-batch, a multiple of data x fsdp; 0: one for each of these
        "logprob_chunk": 1024,  # tokens of a device whose logits exist at one time
    }
    # Of `step_grpo.imitate`, on its own completions; `rows` are the packed rows of a batch, a multiple of
    # data x fsdp, 0: one for each of these.
    imitation = {"epochs": 1, "learning_rate": 1e-5, "rows": 0}
    # Of `step_grpo.train_verifier`; `prefixes` of each completion are judged and trained on, at most.
    verifier_training = {"prefixes": 4, "epochs": 1, "learning_rate": 1e-5, "rows": 0}
    evaluation = {
        "data": data_config(name="HuggingFaceH4/MATH-500", split="test"),
        "questions": 500,  # the first so many of the split; 0: all
        "benchmark_questions": 0,  # the same for each benchmark of `evaluate --benchmarks`
        "samples": 1,  # k, completions a question
        "temperature": 0.6,
        "top_k": 0,
        "top_p": 0.95,
        "min_p": 0.0,
        "max_response_tokens": 16384,
        # What ends the thinking while evaluating, as `rollout.exit`: DEER is `confidence` and an untrained
        # model, FlashThink a `verifier`. A trained model needs nothing.
        "exit": "none",
    }
    # A warning is one line; nothing stops.
    warn = {
        "kl": 0.5,  # nats a token, above
        "sampler_gap": 0.05,  # nats a token, above
        "length": 0.2,  # of the mean tokens of the first step, below
        "truncated": 0.9,  # share of the completions that take the whole budget, from here on
    }
    # What is kept of a training beside metrics.jsonl, and where its figures go; may change in mid-run.
    log = {
        "wandb": "",  # project of Weights & Biases; empty: none
        "tensorboard": False,  # event files in WORKDIR/tensorboard
        "metrics": (),  # functions of your own, as "module:function", that add figures (docs/your_own.md)
        "rollouts": 4,  # completions a step kept in rollouts.jsonl, evenly over its prompts; 0: none
    }
    groups = {"model": model, "lora": lora, "mesh": mesh, "data": data, "rollout": rollout, "reward": reward}
    groups |= {"grpo": grpo, "imitation": imitation, "verifier_training": verifier_training, "warn": warn}
    groups |= {"log": log}
    return ConfigDict({**run, **groups, "eval": evaluation}).lock()


def variant(config: ConfigDict, arg: str, **family: Any) -> ConfigDict:
    """What `get_config(arg)` of a real model returns: the config itself, or with `runlocal` a small one.

    Args:
        config: the full-size run.
        arg: what follows the colon of `--config=FILE.py:ARG`.
        **family: `model_type` and `tied` of the model, for `runlocal`.

    Raises:
        UserError: any other `arg`.
    """
    if arg == "runlocal":
        config = runlocal(config, **family)
    elif arg:
        raise UserError(f"--config: unknown argument {arg!r} after the colon; there is 'runlocal', or none")
    return config.lock()


def runlocal(config: ConfigDict, *, model_type: str, tied: bool) -> ConfigDict:
    """The same program, small enough for two steps on a laptop's CPU: what it learns is nothing.

    The model is tiny and random, but of the same family and with the full vocabulary, so that the real
    tokenizer and chat template serve. Questions are GSM8K's. Both come from the Hub, or from the folder that
    the environment variable STEP_GRPO_TEST_DATA names.
    """
    config = config.copy_and_resolve_references().unlock()
    data = _local_gsm8k()
    config.update(
        {
            "steps": 2,
            "prompts_per_step": 2,
            "save_every": 1,
            "export_dtype": "float32",
            "model": {
                "checkpoint": "",
                "tokenizer": _local_tokenizer() or config.model.checkpoint,
                "architecture": _tiny_architecture(model_type, tied),
                "dtype": "float32",
            },
            "rollout": {
                "samples": 2,
                "lanes": 4,
                "max_prompt_tokens": 512,
                "max_response_tokens": 48,
                "max_probe_tokens": 8,
                "budget_margin": 4,
            },
            "mesh": {"data": 0, "fsdp": 1, "tensor": 1},
            "grpo": {"prompts_per_update": 1, "rows": 1, "row_length": 640, "logprob_chunk": 128},
            "eval": {"questions": 4, "max_response_tokens": 48},
        }
    )
    config.data.update(data)
    config.eval.data.update({**data, "split": "test"})
    if config.eval.data.source == "jsonl":
        config.eval.data.name = str(Path(config.data.name).with_name("math.jsonl"))  # not the training file
    return config


def _tiny_architecture(model_type: str, tied: bool) -> dict[str, Any]:
    """A Hugging Face `config.json` of two narrow layers under the vocabulary of Qwen2 and Qwen3."""
    return {
        "model_type": model_type,
        "vocab_size": 151936,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **({"head_dim": 8} if model_type == "qwen3" else {}),  # Qwen2's is width / heads
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    }


def _local_tokenizer() -> str:
    folder = os.environ.get("STEP_GRPO_TEST_DATA")
    return str(Path(folder) / "qwen3_tokenizer") if folder else ""


def _local_gsm8k() -> dict[str, str]:
    """The fields of a `data_config` that differ for GSM8K."""
    folder = os.environ.get("STEP_GRPO_TEST_DATA")
    if folder:
        name = str(Path(folder) / "benchmarks" / "gsm8k.jsonl")
        return {
            "source": "jsonl",
            "name": name,
            "subset": "",
            "prompt_column": "problem",
            "answer_column": "answer",
            "answer_pattern": "",
        }
    return {
        "name": "openai/gsm8k",
        "subset": "main",
        "prompt_column": "question",
        "answer_column": "answer",
        "answer_pattern": "#### (.*)",
    }


# ---------------------------------------------------------------- checks


def validate(config: ConfigDict) -> None:
    """Checks every field that has wrong values, and the fields that must fit each other.

    Raises:
        UserError: naming the field, its value and what would be right.
    """
    _check_types(config, base_config(), "config")
    _check_run(config)
    _check_model(config.model)
    _check_lora(config.lora)
    _at_least(0, config.mesh, "config.mesh", *AXES)
    _check_data(config.data, "config.data")
    _check_data(config.eval.data, "config.eval.data")
    _check_rollout(config.rollout)
    _check_reward(config.reward)
    _check_functions(config.log, "config.log", "metrics")
    _check_grpo(config)
    _check_eval(config.eval)
    _at_least(0, config.warn, "config.warn", "kl", "sampler_gap", "length", "truncated")
    _at_least(0, config.log, "config.log", "rollouts")
    _check_imitation(config.imitation)
    _check_verifier_training(config.verifier_training)
    needed = next((f"config.{g}.exit" for g in ("rollout", "eval") if config[g].exit == "verifier"), "")
    _check_verifier(config.rollout.verifier, needed)


def _check_types(config: ConfigDict, default: ConfigDict, where: str) -> None:
    """Every field is there and of the type of its default: the checks below compare and divide."""
    for name, usual in default.items():
        field = f"{where}.{name}"
        if name not in config:
            raise UserError(f"{field} is missing; start from step_grpo.config.base_config()")
        value = config[name]
        if isinstance(usual, ConfigDict):
            _require(isinstance(value, ConfigDict), field, value, "a group of fields, a ConfigDict")
            _check_types(value, usual, field)
        elif usual is not None:
            right, fits = _TYPES[type(usual)]
            _require(fits(value), field, value, right)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    """Half a surrogate pair is none: it can neither be tokenized nor saved."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _are_texts(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(map(_is_text, value))


_TYPES: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("True or False", lambda value: isinstance(value, bool)),
    int: ("a whole number", _is_whole),
    float: ("a number", _is_number),
    str: ("a text", _is_text),
    tuple: ("a tuple of texts", _are_texts),
}
"""Of the type of a field's default: what its value must be, in words, and the check."""


def _require(ok: bool, field: str, value: Any, right: str) -> None:
    if not ok:
        raise UserError(f"{field} is {value!r}; it must be {right}")


def _choice(group: ConfigDict, where: str, field: str, choices: Sequence[str]) -> None:
    _require(group[field] in choices, f"{where}.{field}", group[field], " or ".join(map(repr, choices)))


def _at_least(least: float, group: ConfigDict, where: str, *fields: str) -> None:
    for field in fields:
        _require(
            least <= group[field] < math.inf,
            f"{where}.{field}",
            group[field],
            f"a number of at least {least}",
        )


def _positive(group: ConfigDict, where: str, *fields: str) -> None:
    for field in fields:
        _require(0 < group[field] < math.inf, f"{where}.{field}", group[field], "a number above 0")


def _fraction(group: ConfigDict, where: str, *fields: str) -> None:
    for field in fields:
        _require(0 <= group[field] <= 1, f"{where}.{field}", group[field], "between 0 and 1")


def _share(group: ConfigDict, where: str, *fields: str) -> None:
    for field in fields:
        _require(0 < group[field] <= 1, f"{where}.{field}", group[field], "above 0 and at most 1")


def _check_run(config: ConfigDict) -> None:
    _at_least(0, config, "config", "seed")
    _at_least(1, config, "config", "steps", "prompts_per_step", "save_every", "keep_checkpoints")
    _at_least(0, config, "config", "keep_every")
    _choice(config, "config", "export_dtype", ("bfloat16", "float16", "float32"))


def _check_model(model: ConfigDict) -> None:
    where = "config.model"
    _choice(model, where, "dtype", ("bfloat16", "float32"))
    _choice(model, where, "attention", ("auto", "xla", "pallas", "cudnn"))
    _choice(model, where, "remat", ("full", "dots", "none"))
    random = len(model.architecture) > 0
    if bool(model.checkpoint) == random:
        both = "are both set" if random else "are both empty"
        raise UserError(
            f"{where}.checkpoint and {where}.architecture {both}; set the checkpoint to train one, or the "
            "architecture (and an empty checkpoint) for random weights"
        )
    if random:
        kind = model.architecture.get("model_type")
        _require(kind in ("qwen3", "qwen2"), f"{where}.architecture.model_type", kind, "'qwen3' or 'qwen2'")
        _require(bool(model.tokenizer), f"{where}.tokenizer", "", "named, since there is no checkpoint")


def _check_lora(lora: ConfigDict) -> None:
    where = "config.lora"
    _at_least(0, lora, where, "rank")
    _positive(lora, where, "alpha")
    known = set(lora.targets) <= set(LORA_TARGETS) and len(set(lora.targets)) == len(lora.targets)
    right = f"some of {', '.join(LORA_TARGETS)}, each at most once"
    _require(bool(lora.targets) and known, f"{where}.targets", lora.targets, right)
    _choice(lora, where, "base", ("dense", "int8", "int4", "nf4"))
    right = f"'dense' where all weights are trained; {where}.rank is 0"
    _require(lora.rank > 0 or lora.base == "dense", f"{where}.base", lora.base, right)


def _check_data(data: ConfigDict, where: str) -> None:
    _choice(data, where, "source", ("hf", "tfds", "jsonl", "parquet", *GENERATED))
    _choice(data, where, "bad_rows", ("error", "drop"))
    _choice(data, where, "grading", ("math", "choice", "exact"))
    options = data.choice_columns
    ok = isinstance(options, tuple) and all(
        isinstance(name, str) and all(name.split(".")) for name in options
    )
    _require(ok and len(options) < 26, f"{where}.choice_columns", options, "a tuple of fewer than 26 columns")
    graded = data.grading == "choice" or not options
    _require(graded, f"{where}.grading", data.grading, f"'choice', since {where}.choice_columns are given")
    if data.source in GENERATED:
        _at_least(1, data, where, "count")
        _at_least(0, data, where, "seed")
    if data.source == "tasks":
        families(data.name, f"{where}.name")
    elif data.source != "arithmetic":
        _require(bool(data.name), f"{where}.name", data.name, "the name of a dataset or the path of a file")
    for field in ("prompt_column", "answer_column"):
        right = "a column, or a dotted path into one"
        _require(all(data[field].split(".")), f"{where}.{field}", data[field], right)


def _check_rollout(rollout: ConfigDict) -> None:
    where = "config.rollout"
    _require(rollout.samples >= 2, f"{where}.samples", rollout.samples, "at least 2, to compare in a group")
    _at_least(1, rollout, where, "max_prompt_tokens", "max_response_tokens", "max_repetitions")
    _at_least(0, rollout, where, "lanes", "max_probes", "budget_margin")
    _positive(rollout, where, "temperature")
    _at_least(0, rollout, where, "top_k")
    _share(rollout, where, "top_p", "think_ratio")
    _fraction(rollout, where, "delta", "min_p")
    _choice(rollout, where, "exit", EXITS)
    _choice(rollout, where, "cache_dtype", ("", "int8"))
    # The first token of a tentative answer is not counted, so one alone could never be confident.
    _at_least(2, rollout, where, "max_probe_tokens")
    words = rollout.triggers
    ok = bool(words) and all(isinstance(word, str) and word.strip() for word in words)
    _require(ok, f"{where}.triggers", words, "a tuple of words, such as ('Wait',)")
    _require(bool(rollout.inducing_prompt), f"{where}.inducing_prompt", "", "the text that asks for it")
    _texts(rollout, where, "yes_words", "no_words")
    _check_sufficiency(rollout.sufficiency)


def _check_sufficiency(sufficiency: ConfigDict) -> None:
    where = "config.rollout.sufficiency"
    _require(0 <= sufficiency.threshold <= 100, f"{where}.threshold", sufficiency.threshold, "0 to 100")
    _at_least(0, sufficiency, where, "min_gap")
    _require(bool(sufficiency.question), f"{where}.question", "", "the text that asks for a yes or no")


def _check_imitation(imitation: ConfigDict) -> None:
    _at_least(1, imitation, "config.imitation", "epochs")
    _at_least(0, imitation, "config.imitation", "rows")
    _positive(imitation, "config.imitation", "learning_rate")


def _check_verifier_training(training: ConfigDict) -> None:
    _at_least(1, training, "config.verifier_training", "prefixes", "epochs")
    _at_least(0, training, "config.verifier_training", "rows")
    _positive(training, "config.verifier_training", "learning_rate")


def _check_verifier(verifier: ConfigDict, needed: str) -> None:
    """`needed` is the field that asks for a verifier; empty where none does."""
    where = "config.rollout.verifier"
    right = f"named, since {needed} is 'verifier'"
    _require(bool(verifier.checkpoint) or not needed, f"{where}.checkpoint", verifier.checkpoint, right)
    _fraction(verifier, where, "threshold")
    _texts(verifier, where, "delimiters")
    _require(bool(verifier.question), f"{where}.question", "", "the text that asks for a yes or no")


def _texts(group: ConfigDict, where: str, *fields: str) -> None:
    for field in fields:
        texts = group[field]
        ok = not isinstance(texts, str) and bool(texts) and all(isinstance(t, str) and t for t in texts)
        _require(ok, f"{where}.{field}", texts, "a tuple of texts, none of them empty")


def _check_reward(reward: ConfigDict) -> None:
    where = "config.reward"
    _choice(reward, where, "name", rewards.NAMES)
    _check_functions(reward, where, "functions")
    right = f"named, since {where}.name is 'none'"
    _require(len(reward.functions) > 0 or reward.name != "none", f"{where}.functions", (), right)
    _choice(reward, where, "baseline", rewards.BASELINES)
    _fraction(reward, where, "alpha", "beta", "length_penalty", "penalty_from")
    _at_least(1, reward, where, "grading_workers")
    _positive(reward, where, "grading_deadline")


def _check_functions(group: ConfigDict, where: str, field: str) -> None:
    names = group[field]
    ok = not isinstance(names, str) and all(
        isinstance(name, str)
        and all(part.isidentifier() for part in name.replace(":", ".", 1).split("."))
        and ":" in name
        for name in names
    )
    _require(ok, f"{where}.{field}", names, "a tuple of \"module:function\", such as ('my_module:mine',)")


def _check_grpo(config: ConfigDict) -> None:
    grpo, where = config.grpo, "config.grpo"
    _at_least(1, grpo, where, "max_skipped", "prompts_per_update", "row_length", "logprob_chunk")
    _at_least(0, grpo, where, "rows", "dynamic_sampling")
    _choice(grpo, where, "advantage", advantages.NAMES)
    _choice(grpo, where, "loss_mean", LOSS_MEANS)
    _choice(grpo, where, "ratio", RATIOS)
    divides = config.prompts_per_step % grpo.prompts_per_update == 0
    right = f"a divisor of config.prompts_per_step, {config.prompts_per_step}"
    _require(divides, f"{where}.prompts_per_update", grpo.prompts_per_update, right)
    _positive(grpo, where, "learning_rate", "grad_clip", "clip_low", "clip_high")
    _positive(grpo, where, "sequence_clip_low", "sequence_clip_high")
    for field in ("b1", "b2"):
        _require(0 <= grpo[field] < 1, f"{where}.{field}", grpo[field], "at least 0 and below 1")
    for field in ("clip_low", "sequence_clip_low"):
        _require(grpo[field] < 1, f"{where}.{field}", grpo[field], "below 1, for the ratio to stay positive")
    _require(1 < grpo.dual_clip < math.inf, f"{where}.dual_clip", grpo.dual_clip, "a number above 1")
    _at_least(0, grpo, where, "weight_decay", "kl_coef")
    _choice(grpo, where, "moments_dtype", ("float32", "bfloat16"))
    _choice(grpo, where, "old_logprobs", ("trainer", "sampler"))
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    right = f"at least {longest}, config.rollout.max_prompt_tokens + max_response_tokens"
    _require(grpo.row_length >= longest, f"{where}.row_length", grpo.row_length, right)


def _check_eval(evaluation: ConfigDict) -> None:
    where = "config.eval"
    _at_least(0, evaluation, where, "questions", "benchmark_questions", "temperature")  # 0 is greedy
    _at_least(1, evaluation, where, "max_response_tokens", "samples")
    _choice(evaluation, where, "exit", EXITS)
    _at_least(0, evaluation, where, "top_k")
    _share(evaluation, where, "top_p")
    _fraction(evaluation, where, "min_p")


def small_config() -> ConfigDict:
    """What the runs of the models that ship share: a million weights on two cores. Not locked."""
    config = base_config().unlock()
    config.export_dtype = "float32"
    config.model.dtype = "float32"
    config.mesh.data, config.mesh.fsdp = 0, 1  # the model is small: a copy on every device
    config.rollout.samples = 8
    config.rollout.lanes = 128
    config.rollout.budget_margin = 16
    config.grpo.prompts_per_update = 24
    config.grpo.rows = 16
    config.imitation.rows = 16
    config.verifier_training.rows = 16
    config.verifier_training.prefixes = 2
    config.verifier_training.learning_rate = 5e-4
    return config


def sft_config() -> ConfigDict:
    """Supervised fine-tuning on a generated corpus (`step_grpo.sft`)."""
    config = ConfigDict()
    config.seed = 0
    config.tasks = "chains"  # families of problems in the corpus (`step_grpo.data.tasks`), comma-separated
    config.habits = ConfigDict()  # of its author (`step_grpo.data.arithmetic.Habits`)
    config.habits.carelessness = 1.0  # multiplies each family's probabilities to slip outside a check
    config.habits.least_checks = Habits.least_checks  # after the last step
    config.habits.check_on = Habits.check_on  # probability of one more check, once these are written
    config.habits.impatient = Habits.impatient  # probability to stop anywhere, with the right answer
    config.steps = 1000
    config.rows = 16  # packed rows a step
    config.row_length = 320  # tokens a row
    config.learning_rate = 1e-3
    config.warmup_steps = 100
    config.b1 = 0.9
    config.b2 = 0.98
    config.weight_decay = 1e-2
    config.grad_clip = 1.0
    config.moments_dtype = "float32"  # or `bfloat16`
    config.dtype = "float32"
    config.remat = "full"  # or `dots`, `none`
    config.log_every = 20
    config.export_dtype = "bfloat16"
    config.architecture = ConfigDict()
    config.instruction = data_config().instruction
    return config.lock()


def validate_sft(config: ConfigDict) -> None:
    """Checks the fields of an `sft_config`.

    Raises:
        UserError: naming the field, its value and what would be right.
    """
    families(config.tasks, "config.tasks")
    least, right = config.habits.least_checks, f"between 0 and {Habits.max_checks}"
    _require(0 <= least <= Habits.max_checks, "config.habits.least_checks", least, right)
    _fraction(config.habits, "config.habits", "check_on", "impatient")
    _share(config.habits, "config.habits", "carelessness")
    _at_least(0, config, "config", "seed", "weight_decay", "warmup_steps")
    _at_least(1, config, "config", "steps", "rows", "row_length", "log_every")
    _positive(config, "config", "learning_rate", "grad_clip")
    for field in ("b1", "b2"):
        _require(0 <= config[field] < 1, f"config.{field}", config[field], "at least 0 and below 1")
    right = f"above config.warmup_steps, {config.warmup_steps}"
    _require(config.steps > config.warmup_steps, "config.steps", config.steps, right)
    _choice(config, "config", "moments_dtype", ("float32", "bfloat16"))
    _choice(config, "config", "dtype", ("bfloat16", "float32"))
    _choice(config, "config", "remat", ("full", "dots", "none"))
    _choice(config, "config", "export_dtype", ("bfloat16", "float16", "float32"))
