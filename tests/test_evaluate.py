"""Evaluation against transformers, token for token, and what it writes."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from short_run import ROOT, read_records, short_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from step_grpo import cli, evaluate, outcomes, statistics
from step_grpo.data.prompts import EncodedPrompt
from step_grpo.data.sources import Question
from step_grpo.errors import UserError
from step_grpo.evaluate import summarise
from step_grpo.export import export
from step_grpo.model.weights import resolve_checkpoint
from step_grpo.report import results_latex, results_markdown
from step_grpo.reward.grading import Grade
from step_grpo.rollout.engine import Completion
from step_grpo.rollout.phases import REASONS
from step_grpo.scoring import Scored
from step_grpo.statistics import wilson_interval

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


def test_samples_are_repeatable_follow_the_seed_and_are_compared_with_another_run(tmp_path):
    def sampled(name: str, seed: int, samples: int, against: str = "") -> list[list[int]]:
        config = short_config({"seed": seed, "eval": {"questions": 4, "samples": samples}})
        evaluate.main(config, "builtin:tiny", tmp_path / name, against=against)
        records = read_records(tmp_path / name / "completions.jsonl")
        assert [c["sample"] for c in records] == list(range(samples)) * 4
        return [c["token_ids"] for c in records]

    first = sampled("first", 0, 3)
    # Completions depend on the question and the number of the sample alone, not on how many there are.
    assert sampled("again", 0, 1) == first[::3]
    assert len({tuple(ids) for ids in first}) > 4
    other = sampled("other", 1, 3, against=str(tmp_path / "first"))
    assert other != first
    figures = json.loads((tmp_path / "other" / "evaluation.json").read_text())
    tokens = [np.mean([len(ids) for ids in run]) for run in (first, other)]
    assert figures["against"]["tokens"]["mean"] == pytest.approx(tokens[1] - tokens[0])
    assert figures["against"]["questions"] == 4
    assert (figures["questions"], figures["samples"]) == (4, 3)


def test_more_questions_than_there_are_is_refused(tmp_path):
    config = short_config({"eval": {"questions": 17}})
    with pytest.raises(UserError, match=r"config\.eval\.questions is 17, but config\.eval\.data has 16"):
        evaluate.main(config, "builtin:tiny", tmp_path)


def test_prompts_that_are_all_too_long_are_refused(tmp_path):
    config = short_config({"rollout": {"max_prompt_tokens": 4}})
    with pytest.raises(UserError, match=r"config\.rollout\.max_prompt_tokens"):
        evaluate.main(config, "builtin:tiny", tmp_path)


# ---------------------------------------------------------------------- figures


EOS = 9


def scored(prompt: int, sample: int, text: str, grade: Grade, tokens: int = 5, cut: bool = False) -> Scored:
    """A completion that is scored, as far as figures need it."""
    ids = np.full(tokens, EOS)
    ids[-1] = EOS - cut
    nothing = np.zeros(0)
    completion = Completion(prompt, sample, ids, nothing, nothing, "natural", nothing, 0)
    question = Question(f"q:{prompt}", f"question {prompt}", "7")
    return Scored(EncodedPrompt(question, (1,)), completion, text, grade, 1 + text.count("Wait"))


RIGHT, WRONG = Grade(True, True), Grade(False, True)


def test_summary_is_means_and_counts_failures_as_wrong():
    results = [
        scored(0, 0, "\\boxed{7}", RIGHT, 10),
        scored(1, 0, "Wait Wait Wait \\boxed{8}", WRONG, 20),
        scored(2, 0, "", Grade(False, False, "deadline"), 60, cut=True),
        scored(3, 0, "Wait \\boxed{7}", RIGHT, 10),
    ]
    low, high = wilson_interval(2, 4)
    figures = summarise(results, (EOS,))
    assert (
        figures.items()
        >= {
            "accuracy": 0.5,
            "accuracy_low": low,
            "accuracy_high": high,
            "tokens": 25.0,
            "tokens_median": 15.0,
            "steps": 2.0,
            "truncated": 0.25,
            "questions": 4,
            "samples": 1,
            "pass_at_k": {"1": 0.5},
            "maj_at_k": 0.5,
            "grading_failures": 1,
        }.items()
    )


def test_votes_join_right_answers_and_equal_wrong_ones():
    texts = [
        "\\boxed{7}",
        "\\boxed{7.0}",
        "\\boxed{\\frac12}",
        "\\boxed{0.5}",
        "\\boxed{9}",
        "none",
        "\\boxed{ }",
    ]
    group = [scored(0, i, text, RIGHT if i < 2 else WRONG) for i, text in enumerate(texts)]
    assert outcomes.votes_of(group) == [0, 0, 1, 1, 2, -1, -1]
    found = outcomes.outcomes_of(group, (EOS,))
    assert statistics.majority(found.correct, found.votes).tolist() == [0.5]


def test_written_completions_are_read_back_for_a_comparison(tmp_path):
    run = [
        scored(p, s, "\\boxed{7}", RIGHT if p == 1 else WRONG, 5 + p + s, cut=p == s)
        for p in range(3)
        for s in range(2)
    ]
    evaluate.write_completions(tmp_path / "completions.jsonl", run, (EOS,))
    mine = outcomes.recorded(run, outcomes.outcomes_of(run, (EOS,)))
    for against in (tmp_path, tmp_path / "results.json", tmp_path / "completions.jsonl"):
        read = outcomes.read_recorded(outcomes.find_completions(against, ""))
        assert read.questions == mine.questions
        for name in ("correct", "tokens", "steps", "truncated"):
            assert np.array_equal(getattr(read.outcomes, name), getattr(mine.outcomes, name))


def test_runs_are_compared_on_the_questions_that_both_were_asked():
    base = [scored(p, 0, "", RIGHT, 10 * p + 1) for p in (3, 1, 2)]
    other = [scored(p, 0, "", WRONG, 10 * p + 5) for p in (2, 3, 5)]
    runs = [outcomes.recorded(run, outcomes.outcomes_of(run, (EOS,))) for run in (base, other)]
    found = outcomes.comparison(*outcomes.on_common_questions(*runs))
    assert found["questions"] == 2
    assert found["tokens"]["mean"] == 4
    assert found["accuracy"]["mean"] == -1
    with pytest.raises(UserError, match="no question was asked in both"):
        outcomes.on_common_questions(runs[0], outcomes.Recorded((("x", "y"),), runs[1].outcomes))


@pytest.mark.parametrize("content", ["nonsense", '{"id": 1}', '{"id": "a"}\n[]'])
def test_what_is_no_record_of_an_evaluation_is_refused(tmp_path, content):
    (tmp_path / "completions.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"completions\.jsonl is not"):
        outcomes.read_recorded(tmp_path / "completions.jsonl")
    with pytest.raises(UserError, match="nowhere"):
        outcomes.read_recorded(tmp_path / "nowhere.jsonl")


# ---------------------------------------------------------------------- benchmarks


def test_benchmarks_are_evaluated_end_to_end_with_random_weights_and_the_real_tokenizer(tmp_path):
    folder = os.environ.get("STEP_GRPO_TEST_DATA")
    if not folder:
        pytest.skip(
            "STEP_GRPO_TEST_DATA is not set: it names the folder with benchmarks/ and qwen3_tokenizer/"
        )
    config = cli.load_config(f"{ROOT / 'configs' / 'qwen3_8b.py'}:runlocal")
    with config.unlocked():
        config.eval.update({"samples": 2, "benchmark_questions": 2, "max_response_tokens": 6})
        config.rollout.update({"max_response_tokens": 6, "max_prompt_tokens": 256})
    names = ["gsm8k", "math500", "aime24"]
    evaluate.main(config, "", tmp_path, ",".join(names), f"{folder}/benchmarks")
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["benchmarks"]) == names
    for name in names:
        figures, records = results["benchmarks"][name], read_records(tmp_path / name / "completions.jsonl")
        assert (figures["questions"], figures["samples"], len(records)) == (2, 2, 4)
        assert figures["tokens"] == np.mean([c["tokens"] for c in records])
        assert {c["answer"] for c in records} <= {"18", "3", "204", "113"} or name == "math500"
    assert results["average"]["accuracy"] == 0
    assert results["average"]["tokens"] == pytest.approx(
        np.mean([results["benchmarks"][name]["tokens"] for name in names])
    )
    for file in ("results.md", "results.tex"):
        text = (tmp_path / file).read_text()
        assert all(title in text for title in ("GSM8K", "MATH-500", "AIME 2024", "average"))


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_averages_and_tables_agree_with_the_benchmarks(seed):
    rng = np.random.default_rng(seed)

    def random_run(questions: int) -> statistics.Outcomes:
        shape = (questions, 2)
        return statistics.Outcomes(
            rng.random(shape) < 0.5,
            *(rng.integers(1, 50, shape) for _ in range(2)),
            np.zeros(shape),
            np.zeros(shape),
        )

    runs = {"gsm8k": random_run(5), "aime24": random_run(3)}
    compared = {name: (random_run(len(run.correct)), run) for name, run in runs.items()}
    average = evaluate.averages(runs, compared)
    assert average["accuracy"] == pytest.approx(np.mean([run.correct.mean() for run in runs.values()]))
    gains = [other.tokens.mean() / base.tokens.mean() - 1 for base, other in compared.values()]
    assert average["against"]["tokens_relative"]["mean"] == pytest.approx(np.mean(gains))
    measured = {
        name: {
            **statistics.figures(run),
            "left_out": 0,
            "grading_failures": 0,
            "against": outcomes.comparison(*pair),
        }
        for (name, run), pair in zip(runs.items(), compared.values(), strict=True)
    }
    markdown, latex = (write(measured, average) for write in (results_markdown, results_latex))
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 5
    cells = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(cells) == 4
    assert len({row.count("&") for row in cells}) == 1
    assert not re.search(r"(?<!\\)%", "".join(cells))
    assert f"{average['accuracy']:.1%}" in rows[-1]


# ---------------------------------------------------------------------- intervals


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
