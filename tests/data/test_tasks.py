"""The built-in families of problems and the corpora of a model that over-thinks them."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from short_run import ROOT

from step_grpo import cli
from step_grpo.config import data_config, sft_config
from step_grpo.data import arithmetic, tasks
from step_grpo.data.prompts import encode_prompts
from step_grpo.data.sources import Question, load_questions
from step_grpo.data.tasks import FAMILIES, SPLITS, draw, problems
from step_grpo.data.tasks.thoughts import split_of
from step_grpo.data.tiny_tokenizer import build_tokenizer
from step_grpo.errors import UserError
from step_grpo.reward.boxes import last_box
from step_grpo.sft import author, corpus_batches, corpus_tokenizer

EVERY = pytest.mark.parametrize(("name", "split"), list(itertools.product(FAMILIES, SPLITS)))


def solved_by_trying(question: str) -> list[int]:
    """All answers to a question, from its text alone, by trying everything."""
    if question.startswith("Compute "):
        return [eval(question[8:-1])]
    if question.startswith("Solve "):
        sides = compile(re.sub(r"(\d)x", r"\1*x", question[6:-1]).replace("=", "=="), "sides", "eval")
        return [x for x in range(-200, 200) if eval(sides, {"x": x})]
    *numbers, target = map(int, re.findall(r"\d+", question))
    return [max(a, b) for a in numbers for b in numbers if a < b and a + b == target]


def is_hard(question: str) -> bool:
    """Whether a question is out of distribution, as the families' documents say it."""
    if question.startswith("Compute "):
        return len(re.findall(r"[+-]", question)) > 5
    if question.startswith("Solve "):
        return question.count("x") == 2 and "-" in question
    return question.count(",") > 4


@EVERY
def test_answer_is_the_only_one_and_questions_are_distinct(name, split):
    drawn = problems(name, split, 200, seed=3)
    assert len({question for question, _ in drawn}) == 200
    for question, answer in drawn:
        assert solved_by_trying(question) == [int(answer)], question


@EVERY
def test_split_follows_from_the_text(name, split):
    """Splits can share no question, whatever the seeds: the text alone says which one it belongs to."""
    for question, _ in problems(name, split, 200, seed=8):
        assert split == ("ood" if is_hard(question) else split_of(question))


@pytest.mark.parametrize("name", FAMILIES)
def test_usual_problems_of_the_hash_splits_look_alike(name):
    """What is harder is in `ood` alone; training and test have the same lengths of question."""
    lengths = [np.mean([len(q) for q, _ in problems(name, s, 400, seed=1)]) for s in ("train", "test")]
    assert abs(lengths[0] - lengths[1]) < 1


def test_families_are_mixed_evenly_and_a_longer_draw_continues_a_shorter():
    mixed = problems("search,chains", "train", 41, seed=0)
    starts = [question.partition(" ")[0] for question, _ in mixed]
    assert starts == ["Which", "Compute"] * 20 + ["Which"]
    assert problems("search,chains", "train", 30, seed=0) == mixed[:30]
    assert problems("search,chains", "train", 30, seed=1) != mixed[:30]


def test_more_questions_than_a_split_has_are_refused(monkeypatch):
    monkeypatch.setattr(tasks, "IN_VAIN", 300)
    with pytest.raises(UserError, match=r"'test' has only \d+ questions like 'Solve .*ask for fewer"):
        problems("equations", "test", 100_000, seed=0)


def test_every_split_of_every_family_holds_what_a_study_asks_for():
    assert len(problems("chains,equations,search", "train", 6000, seed=0)) == 6000
    assert len(problems("equations", "ood", 500, seed=0)) == 500


# ---------------------------------------------------------------------- as a source of questions


def test_source_gives_the_problems_of_its_split():
    config = data_config(source="tasks", name="equations,search", split="ood", count=12)
    questions = load_questions(config)
    assert [(q.question, q.answer) for q in questions] == problems("equations,search", "ood", 12, seed=0)
    assert questions[3].id == "tasks/equations,search/ood:3"


@pytest.mark.parametrize("source", ["tasks", "arithmetic"])
def test_another_draw_of_a_split_has_other_questions(source):
    fields = {"source": source, "name": "equations,search" if source == "tasks" else "", "split": "test"}
    first, other = (load_questions(data_config(**fields, count=40, seed=seed)) for seed in (0, 1))
    texts = [{q.question for q in questions} for questions in (first, other)]
    assert len(texts[0] & texts[1]) < 8
    assert {q.id for q in first}.isdisjoint(q.id for q in other)  # never taken for the same question
    strays = [text for text in texts[1] if split_of(text) != "test"]
    assert not strays


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "equation"}, r"config\.data\.name is 'equation'; .* chains, equations, search"),
        ({"name": ""}, r"config\.data\.name is empty"),
        ({"name": "chains,chains"}, r"config\.data\.name is 'chains,chains'"),
        ({"name": "chains", "split": "dev"}, r"config\.data\.split is 'dev'; tasks have .*ood"),
        ({"name": "chains", "count": 0}, r"config\.data\.count is 0"),
    ],
)
def test_wrong_field_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        load_questions(data_config(source="tasks", **fields))


# ---------------------------------------------------------------------- the corpora

END = re.compile(
    r"<think>\n((?:.+\n)+)(?:\n\*\*Final Answer\*\*\n\\boxed\{(-?\d+)\})?"
    r"\n</think>\n\nThe answer is \\boxed\{(-?\d+)\}\."
)


def corpus(
    name: str, split: str, count: int = 600, habits: arithmetic.Habits | None = None
) -> list[tuple[str, int, str]]:
    """Question, answer and thought."""
    rng = np.random.default_rng(5)
    drawn = [draw(FAMILIES[name], split, rng) for _ in range(count)]
    family = FAMILIES[name]
    return [(p.question, p.answer, family.over_thinking(p, rng, habits or family.habits)) for p in drawn]


@pytest.mark.parametrize("name", FAMILIES)
def test_author_who_never_stops_early_writes_the_least_number_of_checks(name):
    family, rng = FAMILIES[name], np.random.default_rng(5)
    habits = replace(family.habits, least_checks=4, check_on=0.5, impatient=0.0)
    counts = []
    for _ in range(300):
        lines = family.over_thinking(draw(family, "train", rng), rng, habits).split("\n")
        counts.append(sum(line.startswith("Wait, check: ") for line in lines))
    assert min(counts) == 4
    assert np.mean(np.array(counts) <= 6) > 0.5


def test_corpus_is_of_an_author_with_the_habits_of_the_config():
    config = cli.load_config(str(ROOT / "configs" / "tiny_sft.py")).unlock()
    config.habits.update({"least_checks": 6, "impatient": 0.0})
    tokenizer = corpus_tokenizer(config)
    tokens = next(corpus_batches(config, tokenizer)).tokens
    opened, checks = (np.sum(tokens == tokenizer.convert_tokens_to_ids(t)) for t in ("<think>", "Wait"))
    assert opened > 10 and checks >= 6 * opened


@pytest.mark.parametrize("name", FAMILIES)
def test_careless_author_repairs_more(name):
    """The share of checks that find a difference follows the carelessness of the config."""
    found = {}
    for carelessness in (0.1, 1.0):
        config = sft_config().unlock()
        config.habits.carelessness = carelessness
        habits = author(FAMILIES[name].habits, config.habits)
        texts = "".join(text for _, _, text in corpus(name, "train", habits=habits))
        found[carelessness] = texts.count(", not ") / texts.count("Wait, check: ")
    assert found[1.0] > 2 * found[0.1] > 0
    assert author(FAMILIES[name].habits, sft_config().habits) == FAMILIES[name].habits


@pytest.mark.parametrize("name", FAMILIES)
def test_thought_ends_with_one_answer_mostly_the_right_one(name):
    right, marked = [], []
    for _, answer, text in corpus(name, "train"):
        _, first, last = END.fullmatch(text).groups()
        assert first in (None, last) and last == last_box(text)
        right.append(int(last) == answer)
        marked.append(first is not None)
    assert 0.8 < np.mean(right) < 0.995
    assert 0.85 < np.mean(marked) < 1  # a probe must be able to tell


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_check_themselves_several_times(name):
    waits = [text.count("Wait, check: ") for _, _, text in corpus(name, "train")]
    assert 2 < np.mean(waits) < 5 and min(waits) == 0


@pytest.mark.parametrize("split", ["train", "ood"])
@pytest.mark.parametrize("name", FAMILIES)
def test_corpus_survives_the_tokenizer_and_fits_into_its_rows(name, split):
    config = cli.load_config(str(ROOT / "configs" / "study_sft.py"))
    tokenizer = corpus_tokenizer(config)
    assert len(tokenizer) <= config.architecture.vocab_size
    drawn = corpus(name, split, 300)
    ids = tokenizer([text for _, _, text in drawn], add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(one) for one in ids] == [text for _, _, text in drawn]
    questions = [Question("", question, "") for question, _, _ in drawn]
    prompts = encode_prompts(
        tokenizer, questions, instruction=config.instruction, max_prompt_tokens=config.row_length
    ).kept
    assert max(len(prompt.ids) for prompt in prompts) <= 48
    total = [len(prompt.ids) + len(one) + 1 for prompt, one in zip(prompts, ids, strict=True)]
    if split == "train":
        assert np.mean(np.array(total) <= config.row_length) > 0.97


def test_corpus_of_the_tiny_model_is_what_it_was():
    """Drawing the default family makes the very batches that `assets/tiny` was trained on."""
    config = cli.load_config(str(ROOT / "configs" / "tiny_sft.py"))
    tokenizer = corpus_tokenizer(config)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    rng = np.random.default_rng(config.seed)
    drawn: list[arithmetic.Problem] = []
    while len(drawn) < 512:
        problem = arithmetic.draw_problem(rng)
        if problem.split == "train":
            drawn.append(problem)
    text = arithmetic.over_thinking(drawn[0], rng, arithmetic.Habits())
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    batches = corpus_batches(config, tokenizer)
    for batch in itertools.islice(batches, 40):
        for row, segments in zip(batch.tokens, batch.segment_ids, strict=True):
            for segment in range(1, int(segments.max()) + 1):
                if row[segments == segment].tolist()[-len(expected) - 1 :][: len(expected)] == expected:
                    return
    pytest.fail("the first thought of the old corpus is in none of its first batches")


def test_study_corpus_trains_on_all_families():
    config = cli.load_config(str(ROOT / "configs" / "study_sft.py"))
    tokenizer = corpus_tokenizer(config)
    text = "".join(tokenizer.decode(row) for row in next(corpus_batches(config, tokenizer)).tokens)
    assert all(start in text for start in ("user\nCompute ", "user\nSolve ", "user\nWhich two of "))
