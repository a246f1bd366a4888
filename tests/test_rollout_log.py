"""The rollouts that a run keeps."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from short_run import read_records, short_config

from step_grpo.data.prompts import EncodedPrompt
from step_grpo.data.sources import Question
from step_grpo.reward.grading import Grade
from step_grpo.rollout.engine import Completion
from step_grpo.rollout_log import RolloutLog, kept_rollouts, segments_of
from step_grpo.scoring import Scored

WORDS = ["<think>", "</think>", "a ", "b ", "Wait", ", ", "ing ", "<eos>"]
THINK_END = 1


def decode(tokens, skip_special_tokens):
    assert skip_special_tokens
    return "".join(WORDS[token] for token in tokens if WORDS[token] != "<eos>")


def encode(text, add_special_tokens):
    assert not add_special_tokens
    return [WORDS.index(text)]


TOKENIZER = SimpleNamespace(decode=decode, encode=encode, unk_token_id=None)


def completion(words, reason="natural", forced=(), confidences=()):
    tokens = np.array([WORDS.index(word) for word in words], np.int32)
    return Completion(
        prompt=0,
        sample=0,
        tokens=tokens,
        logprobs=np.zeros(len(tokens)),
        forced=np.isin(np.arange(len(tokens)), forced),
        reason=reason,
        confidences=np.array(confidences, np.float32),
        probe_tokens=0,
    )


def told(made, placed=True):
    """The pieces, each in a word or two."""
    pieces = segments_of(made, TOKENIZER, THINK_END, ("Wait",), placed)
    return [str(p.get("text", p.get("reason", p.get("confidence")))) for p in pieces]


def test_probe_stands_before_its_trigger_and_the_one_that_exits_at_the_end():
    words = ["<think>", "a ", "Wait", ", ", "b ", "</think>", "a ", "<eos>"]
    made = completion(words, "early_exit", forced=[5], confidences=[0.5, 1.0])
    assert told(made) == ["<think>a ", "0.5", "Wait", ", b ", "1.0", "early_exit", "</think>", "a "]
    assert told(made, placed=False) == ["<think>a ", "Wait", ", b ", "early_exit", "</think>", "a "]


def test_triggers_behind_the_probes_that_are_allowed_and_in_the_answer_have_none():
    words = ["Wait", ", ", "Wait", ", ", "</think>", "Wait", ", "]
    made = completion(words, confidences=[0.25])
    assert told(made) == ["0.25", "Wait", ", ", "Wait", ", ", "natural", "</think>", "Wait", ", "]


def test_word_that_goes_on_is_no_trigger_and_thinking_may_end_nowhere():
    assert told(completion(["a ", "Wait", "ing "], "eos", confidences=[])) == ["a Waiting ", "eos"]


def scored(count, size):
    def one(i):
        question = Question(id=f"q{i // size}", question="?", answer="!", grading="math")
        grade = Grade(correct=i % 2 == 0, formatted=True, error=None)
        return Scored(EncodedPrompt(question, (1,)), completion(["a "]), "a ", grade, 1)

    return [one(i) for i in range(count)]


@pytest.mark.parametrize(("wanted", "kept"), [(4, [0, 3, 6, 9]), (0, []), (99, list(range(12)))])
def test_kept_are_evenly_spread_with_their_own_rewards(wanted, kept):
    reward = np.arange(12.0).reshape(3, 4)
    config = short_config({"log": {"rollouts": wanted}})
    records = kept_rollouts(scored(12, 4), reward, TOKENIZER, config)
    assert [record["reward"] for record in records] == kept
    means = reward.mean(axis=1)
    for record, i in zip(records, kept, strict=True):
        assert np.sign(record["advantage"]) == np.sign(i - means[i // 4])
        assert record["id"] == f"q{i // 4}"
        json.dumps(record)


def test_resumed_log_holds_each_step_once(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    with RolloutLog(path) as log:
        for step in (1, 2, 3):
            log.write(step, [{"n": 1}, {"n": 2}])
            assert len(read_records(path)) == 2 * step  # there when `write` returns
    path.write_text(path.read_text() + '{"step": 4, "n')
    with RolloutLog(path, first_step=2) as log:
        log.write(3, [{"n": 9}])
    assert [(r["step"], r["n"]) for r in read_records(path)] == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 9)]


def test_pieces_of_a_real_run_are_the_whole_text_with_all_probes_in_place(finished_run):
    records = read_records(finished_run.workdir / "rollouts.jsonl")
    assert {record["step"] for record in records} == {1, 2}
    assert any(record["reason"] == "early_exit" for record in records)
    for record in records:
        text = "".join(piece.get("text", "") for piece in record["segments"])
        assert record["steps"] == 1 + len(re.findall(r"(?<![A-Za-z])Wait(?![A-Za-z])", text))
        probes = [i for i, piece in enumerate(record["segments"]) if piece["kind"] == "probe"]
        assert [record["segments"][i]["confidence"] for i in probes] == record["confidences"]
        followed = {record["segments"][i + 1]["kind"] for i in probes}
        assert followed <= {"trigger", "exit"}
        if record["reason"] == "early_exit":
            assert record["confidences"][-1] > 0.95
            assert "\n</think>\n\n" in [p["text"] for p in record["segments"] if p["kind"] == "forced"]
