"""The chat: its text is the engine's, its probes leave no trace, and what it prints is all there is."""

import io
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from short_run import short_config

from step_grpo import chat
from step_grpo.chat import End, Piece, Probe, Talk, View, default_config, events, with_temperature
from step_grpo.checkpoint import open_model
from step_grpo.errors import UserError
from step_grpo.evaluate import EVALUATION_STREAM, evaluation_engine, evaluation_prompts
from step_grpo.mesh import make_mesh
from step_grpo.model import qwen
from step_grpo.rollout import programs
from step_grpo.rollout.phases import ANSWER, DONE, PROBE, PUT_BACK, THINK

QUESTIONS, SAMPLES = 3, 2


@pytest.fixture(name="tiny", scope="module")
def tiny_model():
    return open_model("builtin:tiny")


@pytest.fixture(name="talk", scope="module")
def plain_talk(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat, "LEAST_CAPACITY", 128)  # so that it grows on the way
        talk = Talk(tiny.described, tiny.params, short_config())
        assert len(talk.capacities) == 2
        return talk


@pytest.fixture(name="sampled", scope="module")
def sampled_by_the_engine(tiny):
    """The engine's completions by plain sampling, and their prompts."""
    config = short_config({"eval": {"questions": QUESTIONS}, "rollout": {"lanes": 4}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "CAPACITY_LEVELS", 1)  # a growing cache is tested elsewhere
        mesh = make_mesh(data=1, devices=jax.devices()[:1])
        prompts = evaluation_prompts(tiny.described, config)
        engine = evaluation_engine(tiny.described, config, mesh)
        key = jax.random.fold_in(jax.random.key(config.seed), EVALUATION_STREAM)
        ready = qwen.decode_params(tiny.params, jnp.float32)
        completions, _ = engine(ready, [p.ids for p in prompts], SAMPLES, key)
    return SimpleNamespace(config=config, prompts=prompts, completions=completions)


@pytest.fixture(name="said", scope="module")
def said_by_the_chat(talk, sampled):
    """What the chat shows of the same completions."""
    asked = [(p.question.question, sample) for p in sampled.prompts for sample in range(SAMPLES)]
    return [list(talk(*one)) for one in asked]


def tokens(shown):
    return [event.token for event in shown if isinstance(event, Piece)]


def test_chat_says_what_the_engine_samples(said, sampled):
    assert max(len(c.tokens) for c in sampled.completions) > 128
    assert [tokens(shown) for shown in said] == [c.tokens.tolist() for c in sampled.completions]
    assert [shown[-1] for shown in said] == [End(c.reason) for c in sampled.completions]


def test_pieces_make_up_the_text_and_its_parts(said, tiny):
    for shown in said:
        pieces = [event for event in shown if isinstance(event, Piece)]
        text = "".join(piece.text for piece in pieces)
        assert text == tiny.described.tokenizer.decode(tokens(shown), skip_special_tokens=True)
        thinking = "".join(piece.text for piece in pieces if piece.part == "thinking")
        assert thinking == text.partition("</think>")[0] + "</think>" * (shown[-1] == End("natural"))
        assert "forced" not in {piece.part for piece in pieces}
    assert {End("natural"), End("length")} >= {shown[-1] for shown in said} >= {End("natural")}


def test_probes_stand_before_each_trigger_of_the_thinking(said):
    for shown in said:
        text, marked, length = "", [], 0
        for event in shown:
            if isinstance(event, Piece):
                text, length = text + event.text, length + 1
            elif isinstance(event, Probe):
                assert event.position == length
                marked.append(len(text))
        assert marked == [match.start() for match in re.finditer(r"\bWait\b", text.partition("</think>")[0])]


def test_truncated_chat_stops_at_the_first_probe_that_passes(said, sampled, tiny):
    """The same thinking up to there, then the closing text, forced."""
    asked = 0
    passed = [[e for e in shown if isinstance(e, Probe) and e.confidence > 0.95] for shown in said]
    while not passed[asked]:
        asked += 1
    talk = Talk(tiny.described, tiny.params, short_config(), truncated=True)
    question = sampled.prompts[asked // SAMPLES].question.question
    shown = list(talk(question, asked % SAMPLES))
    cut = passed[asked][0].position
    assert tokens(shown)[:cut] == tokens(said[asked])[:cut]
    rest = [event for event in shown if isinstance(event, Piece)][cut:]
    forced = "".join(piece.text for piece in rest if piece.part == "forced")
    assert forced == "\n</think>\n\n" and {p.part for p in rest} == {"forced", "answer"}
    assert shown[-1] == End("early_exit")
    probes = [e for e in shown if isinstance(e, Probe)]
    assert probes[-1].confidence == pytest.approx(passed[asked][0].confidence, abs=1e-5)


# ---------------------------------------------------------------------- what is shown, and when

TEXTS = [b"<eos>", b"</think>", b"W", b"ait", b".", b"caf", b"\xc3", b"\xa9", b"\x1b[2J"]


def view(phase, length, token, **fields):
    zeros = {name: 0 for name in View._fields} | {"forced": False, "confidence": 0.0}  # noqa: C420
    return View(**{**zeros, "phase": phase, "length": length, "token": token, **fields})


def shown_of(views, reach=4):
    return list(events(views, TEXTS, reach, question=2, eos=(0,), think_end=1))


def test_tokens_that_a_probe_may_hold_back_are_not_shown_before_it():
    """`Wait.` arrives, is taken back for a probe that declines, and is put back."""
    views = [
        view(THINK, 1, 4), view(THINK, 2, 2), view(THINK, 3, 3),
        view(PROBE, 1, 4, queued=1),
        view(PROBE, 1, 4, queued=2),
        view(PROBE, 1, 4, queued=2, probe_length=1, token_in=5),
        view(PUT_BACK, 2, 2, probes=1, confidence=0.5),
        view(PUT_BACK, 3, 3, probes=1, confidence=0.5),
        view(THINK, 4, 4, probes=1, confidence=0.5),
        view(ANSWER, 5, 1, probes=1, confidence=0.5),
        view(DONE, 6, 0, probes=1, confidence=0.5, reason=1),
    ]  # fmt: skip
    shown = shown_of(views)
    assert [e.token if isinstance(e, Piece) else e for e in shown] == [
        4, Probe(1, 0.5, "caf"), 2, 3, 4, 1, 0, End("natural")
    ]  # fmt: skip
    assert [len(shown_of(views[:n])) - 1 for n in (1, 2, 3, 4, 7)] == [0, 0, 1, 1, 2]


@given(st.lists(st.sampled_from([2, 3, 4, 5, 6, 7]), min_size=1, max_size=12), st.integers(1, 6))
def test_text_does_not_depend_on_how_long_tokens_are_kept_back(written, reach):
    views = [view(THINK, n, token) for n, token in enumerate(written, 1)]
    views.append(view(DONE, len(written) + 1, 0, reason=5))
    pieces = [e for e in shown_of(views, reach) if isinstance(e, Piece)]
    assert [p.token for p in pieces] == [*written, 0]
    whole = b"".join(TEXTS[t] for t in written).decode("utf-8", "replace")
    assert "".join(p.text for p in pieces) == whole.removesuffix("\N{REPLACEMENT CHARACTER}") or (
        "".join(p.text for p in pieces) == whole
    )


class Said:
    """Stands for a model that always says the same."""

    def __init__(self, *shown, truncated=False):
        self.shown, self.truncated, self.config, self.asked = shown, truncated, short_config(), []

    def __call__(self, question, sample):
        self.asked.append((question, sample))
        if question == "long":
            raise UserError("the question is longer than that")
        return iter(self.shown)


SHOWN = (
    Piece(4, "1+2=3.\n", "thinking"), Probe(1, 0.5, "{3}\n"), Piece(2, "Wait", "thinking"),
    Probe(2, 0.97, "{4}"), Piece(2, "Wait", "thinking"), Probe(3, 0.99, "{4}"),
    Piece(1, "\x1b[2J[bold]</think>", "thinking"), Piece(3, "It is 4.", "answer"), End("natural"),
)  # fmt: skip


def printed(talk, **settings):
    out = io.StringIO()
    chat.show(Console(file=out, soft_wrap=True, highlight=False, **settings), talk, "q", 0)
    return out.getvalue()


def test_first_probe_that_passes_is_where_it_would_stop():
    text = printed(Said(*SHOWN))
    assert "[probe: 3, 0.500] Wait[probe: 4, 0.970, would stop here] Wait[probe: 4, 0.990] " in text
    assert (
        "4 tokens of thinking (natural), 1 of answer, 3 probes; early exit would have left out 2 of 4" in text
    )
    assert "0.970, stops here]" in printed(Said(*SHOWN, truncated=True))


def test_what_a_model_writes_cannot_steer_the_terminal():
    text = printed(Said(*SHOWN), force_terminal=True, color_system="standard")
    assert "\x1b[2J" not in text and "[2J[bold]</think>" in text
    assert re.search(r"\x1b\[36m1\+2=3", text) and "\x1b[1mIt is 4." in text


def run_main(monkeypatch, lines, talk, **flags):
    monkeypatch.setattr(chat, "Talk", lambda *a, **k: talk)
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat.main("builtin:tiny", **flags)


def test_every_line_is_a_question_and_the_same_one_gets_its_next_sample(monkeypatch, capsys):
    talk = Said(*SHOWN)
    run_main(monkeypatch, "a\n\nlong\nb\na\n", talk)
    assert talk.asked == [("a", 0), ("long", 0), ("b", 0), ("a", 1)]
    assert "longer than that" in capsys.readouterr().out
    run_main(monkeypatch, "ignored\n", talk, question="c")
    assert talk.asked[4:] == [("c", 0)]


def test_ctrl_c_ends_the_chat_without_a_traceback(monkeypatch):
    class Interrupted(Said):
        def __call__(self, question, sample):
            raise KeyboardInterrupt

    run_main(monkeypatch, "a\nb\n", Interrupted())


# ---------------------------------------------------------------------- settings


def test_settings_are_those_of_the_run_or_fit_the_model(tiny):
    config = default_config(tiny)
    assert config.eval.max_response_tokens == 1024 and config.rollout.max_prompt_tokens == 512
    assert config.model.dtype == "float32" and config.rollout.delta == 0.95
    ran = short_config({"rollout": {"delta": 0.5, "triggers": ("But",)}})
    kept = default_config(
        SimpleNamespace(described=tiny.described, settings=json.loads(json.dumps(ran.to_dict())))
    )
    assert kept.rollout.delta == 0.5 and tuple(kept.rollout.triggers) == ("But",)
    assert kept.eval.max_response_tokens == ran.eval.max_response_tokens


def test_temperature_of_the_flag_is_used_and_checked():
    assert with_temperature(short_config(), "0").eval.temperature == 0
    assert with_temperature(short_config(), "").eval.temperature == 0.6
    for text in ("hot", "-1", "inf"):
        with pytest.raises(UserError, match=f"--temperature={text}: it must be a number, 0 or above"):
            with_temperature(short_config(), text)


def test_question_that_is_too_long_is_told(talk):
    with pytest.raises(UserError, match=r"longer than config\.rollout\.max_prompt_tokens, 32"):
        talk.prompt("1+" * 40)
