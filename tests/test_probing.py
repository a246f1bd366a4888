"""Offline probes: they stand where the engine's do, and give the confidences that the engine gives."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from short_run import short_config

from step_grpo import probing
from step_grpo.checkpoint import open_model
from step_grpo.data.tiny_tokenizer import build_tokenizer
from step_grpo.errors import UserError
from step_grpo.evaluate import evaluation_engine, evaluation_prompts, write_completions
from step_grpo.mesh import make_mesh
from step_grpo.model import qwen
from step_grpo.probing import (
    Tentative,
    find_probes,
    read_completions,
    tentative_answers,
    trigger_positions,
)
from step_grpo.reward.grading import Grade
from step_grpo.reward.steps import trigger_pattern
from step_grpo.rollout import programs
from step_grpo.rollout.triggers import build_triggers
from step_grpo.scoring import Scored

PIECES = [b"Wait", b"W", b"ait", b".Wait", b"Waiting", b",", b" ", b"a", b"ing", b"</think>"]
TABLE = jax.tree.map(np.asarray, build_triggers(PIECES, ("Wait",)))
DELTA = 0.9995  # the built-in model declines some probes and passes others


@given(st.lists(st.integers(0, len(PIECES) - 1), max_size=20))
def test_probes_begin_at_the_token_in_which_a_regex_finds_a_trigger_of_the_thinking(tokens):
    end = len(PIECES) - 1
    read = tokens[: tokens.index(end) + 1] if end in tokens else tokens
    text = b"".join(PIECES[t] for t in read)
    ends = np.cumsum([len(PIECES[t]) for t in read])
    matches = trigger_pattern(("Wait",)).finditer(text.decode())
    expected = [
        int(np.searchsorted(ends, match.start(), side="right"))
        for match in matches
        if match.end() < len(text)
    ]
    assert trigger_positions(tokens, TABLE, [len(p) for p in PIECES], {end}) == expected


@pytest.fixture(name="sampled", scope="module")
def sampled_with_probes():
    """Completions of the engine that cuts them short, with whatever its probes found."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "CAPACITY_LEVELS", 1)  # a growing cache is tested elsewhere
        config = short_config(
            {"rollout": {"early_abort": False, "delta": DELTA, "max_probes": 30}},
            {"eval": {"exit": "confidence", "questions": 8}},
        )
        mesh = make_mesh(data=1, devices=jax.devices()[:1])
        opened = open_model("builtin:tiny", mesh)
        prompts = evaluation_prompts(opened.described, config)
        engine = evaluation_engine(opened.described, config, mesh)
        ready = qwen.decode_params(opened.params, jnp.float32)
        completions, _ = engine(ready, [p.ids for p in prompts], 2, jax.random.key(0))
        decode = opened.described.tokenizer.decode
        scored = [Scored(prompts[c.prompt], c, decode(c.tokens), Grade(False, False), 1) for c in completions]
        yield SimpleNamespace(config=config, mesh=mesh, opened=opened, scored=scored)


def test_confidences_are_those_that_the_engine_recorded(sampled, tmp_path):
    path = tmp_path / "completions.jsonl"
    write_completions(path, sampled.scored, sampled.opened.described.eos_ids)
    described, config = sampled.opened.described, sampled.config
    probes = find_probes(described, read_completions(path, 0), config.eval.data, ("Wait",))
    answers = tentative_answers(described, sampled.opened.params, probes, config, sampled.mesh)
    # Where the thinking was cut, the last probe's trigger is no part of the text.
    recorded = [s.completion.confidences[: -1 if s.completion.forced.any() else None] for s in sampled.scored]
    assert {s.completion.reason for s in sampled.scored} >= {"natural", "early_exit"}
    positions = [(p.prompt.question.id, p.sample) for p in probes]
    for s, own in zip(sampled.scored, recorded, strict=True):
        assert positions.count((s.prompt.question.id, s.completion.sample)) == len(own)
    assert len(probes) > 10
    found = [answer.confidence for answer in answers]
    np.testing.assert_allclose(found, np.concatenate(recorded), atol=1e-4)
    assert np.ptp(found) > 0.01


# ---------------------------------------------------------------------- files

TINY = build_tokenizer()
ROWS = [
    {"id": f"q{q}", "sample": sample, "prompt": f"Compute {q}+2.", "answer": str(q + 2),
     "token_ids": TINY.encode(f"<think>\n{q}+2={q + 2}.\nWait, check: {q}+2={q + 2}, yes.\n</think>")}
    for q in range(3) for sample in (0, 1)
]  # fmt: skip


def write_rows(folder, rows):
    path = folder / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_first_sample_of_the_first_questions_is_read(tmp_path):
    path = write_rows(tmp_path, ROWS)
    assert [(row["id"], row["sample"]) for row in read_completions(path, 2)] == [("q0", 0), ("q1", 0)]
    assert len(read_completions(path, 0)) == 6 and len(read_completions(path, 9)) == 3


def test_files_say_what_each_probe_answered_and_how_right_it_was(tmp_path, monkeypatch, capsys):
    """Everything but the model: tentative answers are given."""
    said = {"q0": ("{2}\n</think>", 0.97), "q1": ("{9}\n</think>", 0.99), "q2": ("{4", 0.1)}
    prefixes = []

    def answers(described, params, probes, config, mesh):
        prefixes.extend(TINY.decode(probe.prefix) for probe in probes)
        texts = [said[probe.prompt.question.id] for probe in probes]
        return [Tentative(tuple(TINY.encode(text)), confidence) for text, confidence in texts]

    monkeypatch.setattr(probing, "tentative_answers", answers)
    path = write_rows(tmp_path, ROWS)
    probing.main(short_config(), str(path), "builtin:tiny", tmp_path / "out", questions="3")
    assert prefixes == [f"<think>\n{q}+2={q + 2}.\n" for q in range(3)]
    rows = [json.loads(line) for line in (tmp_path / "out" / "probes.jsonl").read_text().splitlines()]
    assert [(r["id"], r["answer"], r["correct"]) for r in rows] == [
        ("q0", "2", True), ("q1", "9", False), ("q2", None, False)
    ]  # fmt: skip
    assert set(rows[0]) == {"id", "sample", "position", "confidence", "answer", "correct"}
    assert rows[0]["position"] == len(TINY.encode("<think>\n0+2=2.\n"))
    figures = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert (figures["completions"], figures["count"], figures["precision_above_delta"]) == (3, 3, 0.5)
    assert figures["ece"] == pytest.approx((0.99 + 0.97 - 1 + 0.1) / 3)
    assert (tmp_path / "out" / "calibration.png").stat().st_size > 1000
    assert "3 probes" in capsys.readouterr().out


def test_line_ends_of_unicode_in_a_text_end_no_record(tmp_path):
    path = tmp_path / "completions.jsonl"
    rows = [{**ROWS[0], "text": "a\u2028b\x85c"}, {**ROWS[0], "sample": 1}]
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    assert len(read_completions(path, 0)) == 2


def test_completions_without_triggers_are_no_mistake(tmp_path, capsys):
    rows = [{**ROWS[0], "token_ids": TINY.encode("<think>\n0+2=2.\n</think>\n\nWait. So")}]
    probing.main(short_config(), str(write_rows(tmp_path, rows)), "builtin:tiny", tmp_path / "out")
    assert "no triggers in the thinking of 1 completions" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["ece"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a"}\n', "is not a completions.jsonl of step_grpo.evaluate .KeyError: 'sample'"),
        ("words\n", "is not a completions.jsonl"),
        ("", "is empty"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    path = tmp_path / "completions.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_completions(path, 0)
    with pytest.raises(UserError, match=r"is not a completions\.jsonl"):
        read_completions(tmp_path / "none.jsonl", 0)


def test_number_of_questions_must_be_one(tmp_path):
    with pytest.raises(UserError, match="--questions=few: it must be a number"):
        probing.main(short_config(), "x", workdir=tmp_path, questions="few")
