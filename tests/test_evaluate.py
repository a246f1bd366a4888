"""Evaluation against transformers, token for token, and what it writes."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from short_run import read_records, short_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from step_grpo import evaluate
from step_grpo.errors import UserError
from step_grpo.evaluate import summarise, wilson_interval
from step_grpo.export import export
from step_grpo.model.weights import resolve_checkpoint
from step_grpo.reward.grading import Grade
from step_grpo.rollout.phases import REASONS

QUESTIONS = 12
GREEDY = {"eval": {"temperature": 0.0, "questions": QUESTIONS}}
KEYS = {"prompt", "text", "token_ids", "correct", "tokens", "steps", "exit_reason"}


def greedy_completions(checkpoint: str | Path, workdir: Path) -> list[dict]:
    evaluate.main(short_config(GREEDY), str(checkpoint), workdir)
    return read_records(workdir / "completions.jsonl")


def transformers_greedy(folder: Path, asked: list[dict]) -> list[list[int]]:
    """Greedy completions of transformers to the same questions, each up to the token that ends it."""
    config = short_config()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chats = [[{"role": "user", "content": c["prompt"] + config.data.instruction}] for c in asked]
    prompts = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        enable_thinking=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**prompts, do_sample=False, max_new_tokens=config.eval.max_response_tokens)
    ends = model.generation_config.eos_token_id
    completions = []
    for row in out[:, prompts["input_ids"].shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row))
        completions.append(row[: end + 1])
    return completions


@pytest.fixture(scope="module")
def greedy(tmp_path_factory):
    """Greedy completions of the built-in model, and the folder of its weights."""
    workdir = tmp_path_factory.mktemp("greedy")
    return greedy_completions("builtin:tiny", workdir), workdir


def test_greedy_completions_equal_transformers_token_for_token(greedy):
    completions, _ = greedy
    assert len(completions) == QUESTIONS
    expected = transformers_greedy(resolve_checkpoint("builtin:tiny"), completions)
    assert [c["token_ids"] for c in completions] == expected


def test_export_generates_the_same_text_here_and_in_transformers(greedy, tmp_path):
    out = export("builtin:tiny", tmp_path / "out", dtype="float32")
    completions = greedy_completions(out, tmp_path / "evaluation")
    assert completions == greedy[0]
    assert [c["token_ids"] for c in completions] == transformers_greedy(out, completions)


def test_trained_model_generates_the_same_text_before_and_after_its_export(finished_run, tmp_path):
    completions = greedy_completions(finished_run.workdir, tmp_path / "evaluation")
    out = export(finished_run.workdir, tmp_path / "out")
    assert [c["token_ids"] for c in completions] == transformers_greedy(out, completions)


def test_every_eos_id_ends_a_completion(tmp_path):
    """A second end token that the model really writes: the word that opens a check."""
    folder = tmp_path / "two_ends"
    shutil.copytree(resolve_checkpoint("builtin:tiny"), folder)
    end, wait = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(["<|im_end|>", "Wait"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, wait]}))
    completions = greedy_completions(folder, tmp_path / "evaluation")
    tokens = [c["token_ids"] for c in completions]
    assert tokens == transformers_greedy(folder, completions)
    assert wait in {ids[-1] for ids in tokens}
    assert all(not {end, wait} & set(ids[:-1]) for ids in tokens)
    assert all(c["exit_reason"] == "eos" for c in completions if c["token_ids"][-1] == wait)


# ---------------------------------------------------------------------- what is written


def test_completions_have_the_documented_fields_and_they_agree(greedy):
    tokenizer = AutoTokenizer.from_pretrained(resolve_checkpoint("builtin:tiny"))
    think_end = tokenizer.convert_tokens_to_ids("</think>")
    for c in greedy[0]:
        assert set(c) >= KEYS
        assert c["tokens"] == len(c["token_ids"])
        assert c["text"] == tokenizer.decode(c["token_ids"], skip_special_tokens=True)
        assert c["steps"] == 1 + len(re.findall(r"\bWait\b", c["text"]))
        assert c["exit_reason"] in REASONS
        assert (c["exit_reason"] == "natural") == (think_end in c["token_ids"])
        expression = c["prompt"].removeprefix("Compute ").removesuffix(".")
        boxes = re.findall(r"\\boxed\{(-?\d+)\}", c["text"])
        assert c["correct"] == (bool(boxes) and int(boxes[-1]) == eval(expression))  # only digits and signs


def test_figures_summarise_the_completions(greedy):
    completions, workdir = greedy
    figures = json.loads((workdir / "evaluation.json").read_text())
    correct = sum(c["correct"] for c in completions)
    assert figures["accuracy"] == correct / QUESTIONS
    assert (figures["accuracy_low"], figures["accuracy_high"]) == wilson_interval(correct, QUESTIONS)
    assert figures["tokens"] == pytest.approx(sum(c["tokens"] for c in completions) / QUESTIONS)
    assert figures["steps"] == pytest.approx(sum(c["steps"] for c in completions) / QUESTIONS)
    assert figures["questions"] == QUESTIONS
    assert figures["grading_failures"] == 0


def test_sampled_evaluation_is_repeatable_and_follows_the_seed(tmp_path):
    def sampled(name: str, seed: int) -> list[list[int]]:
        config = short_config({"seed": seed, "eval": {"questions": 4}})
        evaluate.main(config, "builtin:tiny", tmp_path / name)
        return [c["token_ids"] for c in read_records(tmp_path / name / "completions.jsonl")]

    first = sampled("first", 0)
    assert sampled("again", 0) == first
    assert sampled("other", 1) != first


def test_more_questions_than_there_are_is_refused(tmp_path):
    config = short_config({"eval": {"questions": 17}})
    with pytest.raises(UserError, match=r"config\.eval\.questions is 17, but config\.eval\.data has 16"):
        evaluate.main(config, "builtin:tiny", tmp_path)


def test_prompts_that_are_all_too_long_are_refused(tmp_path):
    config = short_config({"rollout": {"max_prompt_tokens": 4}})
    with pytest.raises(UserError, match=r"config\.rollout\.max_prompt_tokens"):
        evaluate.main(config, "builtin:tiny", tmp_path)


# ---------------------------------------------------------------------- figures


class Result:
    """The parts of a scored completion that count here."""

    def __init__(self, tokens: int, steps: int, grade: Grade):
        self.completion, self.steps, self.grade = type("C", (), {"tokens": range(tokens)}), steps, grade


def test_summary_is_means_and_counts_failures_as_wrong():
    results = [
        Result(10, 1, Grade(True, True)),
        Result(20, 4, Grade(False, True)),
        Result(60, 1, Grade(False, False, "deadline")),
        Result(10, 2, Grade(True, True)),
    ]
    low, high = wilson_interval(2, 4)
    assert summarise(results) == {
        "accuracy": 0.5,
        "accuracy_low": low,
        "accuracy_high": high,
        "tokens": 25.0,
        "steps": 2.0,
        "questions": 4,
        "grading_failures": 1,
    }


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval_equals_published_values(successes, trials, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_interval_ends_where_the_share_is_z_deviations_away(case):
    successes, trials = case
    share = successes / trials
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / trials, rel=1e-9, abs=1e-12)
