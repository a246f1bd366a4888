"""Rewards and metrics of the user's own."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from short_run import short_config, train

from step_grpo import checkpoint, functions
from step_grpo.config import validate
from step_grpo.data.prompts import EncodedPrompt
from step_grpo.data.sources import Question
from step_grpo.errors import FunctionError, UserError
from step_grpo.export import export
from step_grpo.reward.grading import Grade
from step_grpo.rollout.engine import Completion
from step_grpo.scoring import Scored

DOCS = Path(__file__).parents[1] / "docs" / "your_own.md"
QUESTIONS = [Question("0", "1 + 1?", "2"), Question("1", "2 + 2?", "4")]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes the user's module, in a folder where it is found."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(code: str, name: str = "my_module") -> None:
        (tmp_path / f"{name}.py").write_text(code)

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def config_of(rewards=(), metrics=(), **reward):
    return short_config({"reward": {"functions": rewards, **reward}, "log": {"metrics": metrics}})


def scored(question: int, text: str, correct: bool, steps: int) -> Scored:
    tokens = np.arange(3 * steps, dtype=np.int32)
    completion = Completion(
        prompt=question,
        sample=0,
        tokens=tokens,
        logprobs=np.zeros(len(tokens), np.float32),
        forced=np.zeros(len(tokens), bool),
        reason="early_exit" if correct else "budget",
        confidences=np.zeros(0, np.float32),
        probe_tokens=0,
    )
    prompt = EncodedPrompt(QUESTIONS[question], (1, 2))
    return Scored(prompt, completion, text, Grade(correct, correct, None), steps)


BATCH = [
    scored(0, "a\n</think>\n\n1\n2\n3\n4", True, 1),
    scored(0, "Hmm. Hmm.", False, 2),
    scored(1, "Hmm</think>\n\n4", True, 3),
    scored(1, "", False, 4),
]
REWARD = np.array([[1.0, 0.0], [0.5, 0.25]])


def test_functions_see_the_completions_in_order_and_cannot_change_them():
    seen = functions.completions_of(BATCH, (2, 2))
    assert seen.questions == ("1 + 1?", "2 + 2?") and seen.answers == ("2", "4")
    assert seen.texts == ((BATCH[0].text, BATCH[1].text), (BATCH[2].text, BATCH[3].text))
    assert seen.reasons == (("early_exit", "budget"),) * 2
    assert seen.correct.tolist() == seen.formatted.tolist() == [[True, False], [True, False]]
    assert seen.steps.tolist() == [[1, 2], [3, 4]] and seen.tokens.tolist() == [[3, 6], [9, 12]]
    for array in (seen.correct, seen.formatted, seen.steps, seen.tokens):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 0
    with pytest.raises(AttributeError):
        seen.texts = ()


def test_example_of_the_docs_does_what_they_say(module):
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    module(code)
    own = functions.load(config_of(("my_module:short_answers",), ("my_module:wording",)))
    own.rehearse(QUESTIONS, 2)
    reward, figures = own.judge(BATCH, REWARD)
    np.testing.assert_allclose(reward, REWARD - [[0.1, 0], [0, 0]])
    assert figures == {"reward/short_answers": pytest.approx(-0.025), "wording/hmm": 0.75}


def test_terms_add_up_and_keep_every_bit(module):
    module("def a(c): return c.steps / 3\ndef b(c): return [[1, 2], [3, 4]]")
    reward, figures = functions.load(config_of(("my_module:a", "my_module:b"))).judge(BATCH, REWARD)
    steps = np.array([[1, 2], [3, 4]])
    np.testing.assert_array_equal(reward, REWARD + steps / 3 + steps)
    assert figures == {"reward/a": np.mean(steps / 3), "reward/b": 2.5}


def test_without_functions_the_reward_is_the_same_object():
    own = functions.load(config_of())
    own.rehearse(QUESTIONS, 2)
    assert own.judge(BATCH, REWARD)[0] is REWARD


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return 1", r"my_module:mine returns shape \(\); it must be \[prompts, samples\], here \(2, 2\)"),
        ("return c.steps.T[:1]", r"returns shape \(1, 2\)"),
        ("return [[1, 2], [3]]", "returns list, not an array"),
        ("return None", r"shape \(\)|NoneType"),
        ("return [['a', 'b'], ['c', 'd']]", "returns list, not an array"),
        ("return c.steps / [[1, 1], [0, 1]]", r"returns inf for completion 0 of the question '2 \+ 2\?'"),
        ("return c.steps * float('nan')", "returns nan for completion 0"),
        ("return c.stepz", r"AttributeError: .*stepz.* \(my_module\.py, line 2\)"),
    ],
)
def test_reward_that_is_none_is_named_with_what_is_wrong(module, body, said):
    module(f"def mine(c):\n    {body}")
    own = functions.load(config_of(("my_module:mine",)))
    for call in (lambda: own.rehearse(QUESTIONS, 2), lambda: own.judge(BATCH, REWARD)):
        with pytest.raises(UserError, match=said) as caught:
            call()
        assert "config.reward.functions: my_module:mine" in str(caught.value)
    assert isinstance(caught.value, FunctionError)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("3.0", "returns float, not a dict"),
        ("{1: 2.0}", "returns the name 1"),
        ("{'a b': 2.0}", "returns the name 'a b'"),
        ("{'': 2.0}", "returns the name ''"),
        ("{'../reward': 2.0}", "returns the name"),
        ("{'a': 'b'}", "returns 'b' for 'a', not a float"),
    ],
)
def test_metric_that_is_none_is_named_with_what_is_wrong(module, returned, said):
    module(f"def mine(c): return {returned}")
    own = functions.load(config_of((), ("my_module:mine",)))
    with pytest.raises(UserError, match=rf"config\.log\.metrics: my_module:mine {said}"):
        own.rehearse(QUESTIONS, 2)


def test_figures_of_a_metric_cannot_stand_for_the_programs_own(module):
    module("def mine(c): return {'accuracy': 2.0, 'reward': 3}\ndef reward(c): return {'mine': 1.0}")
    own = functions.load(config_of((), ("my_module:mine",)))
    assert own.judge(BATCH, REWARD)[1] == {"mine/accuracy": 2.0, "mine/reward": 3.0}
    with pytest.raises(UserError, match="my_module:reward is not the only 'reward'"):
        functions.load(config_of((), ("my_module:reward",)))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("my_other:mine", r"there is no module 'my_other'; start from the folder of its file"),
        ("my_module:other", "there is no function 'other' in my_module"),
        ("my_module:number", "int, no function, 'number'"),
        ("my_broken:mine", r"importing my_broken fails: ZeroDivisionError.*my_broken\.py, line 2"),
        ("my_needy:mine", "importing my_needy fails: ModuleNotFoundError.*no_such_package"),
    ],
)
def test_function_that_cannot_be_had_is_named(module, path, said):
    module("number = 3")
    module("x = 1\n1 / 0", "my_broken")
    module("import no_such_package", "my_needy")
    with pytest.raises(UserError, match=rf"config\.reward\.functions: {said}"):
        functions.load(config_of((path,)))


def test_two_functions_of_one_name_are_refused(module):
    module("def mine(c): ...")
    module("def mine(c): ...", "my_second")
    with pytest.raises(UserError, match="my_second:mine is not the only 'mine'"):
        functions.load(config_of(("my_module:mine", "my_second:mine")))


def test_functions_alone_may_be_the_reward_but_not_nothing():
    validate(config_of(("my_module:mine",), name="none"))
    with pytest.raises(UserError, match=r"config\.reward\.functions is \(\); .* 'none'"):
        validate(config_of(name="none"))


# ---------------------------------------------------------------------- whole runs

FAILING = """
import numpy as np
calls = []

def length(c):
    calls.append(c)
    if len(calls) == 3:  # the rehearsal, the first step, the second
        raise RuntimeError("the judge does not answer")
    return -c.tokens / 160

def longest(c):
    return {"tokens": c.tokens.max()}
"""


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory):
    """A run of two steps whose function fails at the second, and the same line again."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "my_judge.py").write_text(FAILING)
    sys.path.insert(0, str(folder))
    own = {
        "reward": {"name": "none", "functions": ("my_judge:length",)},
        "log": {"metrics": ("my_judge:longest",)},
    }
    config = short_config({"save_every": 100}, own)  # the programs are those of `finished_run`
    workdir = folder / "run"
    try:
        with pytest.raises(FunctionError, match=r"my_judge:length fails: RuntimeError: the judge does not"):
            train(config, workdir)
        saved = [path.name for path in checkpoint.saved_steps(workdir)]
        return saved, train(config, workdir)
    finally:
        sys.path.remove(str(folder))


def test_function_that_fails_costs_no_step_that_was_done(stopped_and_resumed):
    saved, run = stopped_and_resumed
    assert saved == ["000001"]
    assert [line["step"] for line in run.metrics] == [1, 2]


def test_functions_of_a_run_make_its_reward_and_figures(stopped_and_resumed):
    for line in stopped_and_resumed[1].metrics:
        assert line["reward"] == line["reward/length"] == pytest.approx(-line["tokens"] / 160)
        assert line["longest/tokens"] >= line["tokens"]


def test_config_of_a_checkpoint_imports_nothing(stopped_and_resumed, tmp_path):
    run = stopped_and_resumed[1]
    sys.modules.pop("my_judge", None)
    assert checkpoint.open_model(run.workdir).settings["reward"]["functions"] == ["my_judge:length"]
    assert export(run.workdir, tmp_path / "out").is_dir()
    assert "my_judge" not in sys.modules
