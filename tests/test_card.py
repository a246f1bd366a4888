"""The model card: what the Hub's own library reads of it, and what of it is literal text."""

import pytest
from huggingface_hub import ModelCard

from step_grpo.card import CURVE, ROWS, card_of, curve_of, front_matter
from step_grpo.export import export, model_card, run_card
from step_grpo.metrics import read_metrics

HF = {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
SETTINGS = {
    "steps": 2,
    "model": {"checkpoint": "Qwen/Qwen3-0.6B"},
    "data": {"source": "hf", "name": "openai/gsm8k"},
    "eval": {"data": {"source": "hf", "name": "openai/gsm8k", "subset": "main", "split": "test"}},
}
RESULT = {
    "before": {"accuracy": 0.5, "tokens": 200.0, "steps": 4.0},
    "after": {"accuracy": 0.625, "tokens": 120.5, "steps": 2.25},
    "exits": {"early_exit": 0.75},
    "seconds": 12.0,
}


def lines(count):
    return [{"step": step, "reward": step / 8, "loss": 1.0} for step in range(1, count + 1)]


def loaded(card, tmp_path) -> ModelCard:
    path = tmp_path / "README.md"
    path.write_text(model_card(card, HF), encoding="utf-8")
    return ModelCard.load(path)


def test_hub_reads_the_results_and_where_the_model_comes_from(tmp_path):
    data = loaded(card_of(SETTINGS, RESULT, lines(2)), tmp_path).data
    assert (data.base_model, data.license, data.datasets) == (
        "Qwen/Qwen3-0.6B",
        "apache-2.0",
        ["openai/gsm8k"],
    )
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"step-grpo", "grpo"} <= set(data.tags)
    assert {r.metric_type: r.metric_value for r in data.eval_results} == RESULT["after"]
    for result in data.eval_results:
        assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
            *("openai/gsm8k", "main", "test"),
        )


def test_card_says_nothing_that_is_not_known(tmp_path):
    other = {
        **SETTINGS,
        "model": {"checkpoint": str(tmp_path)},
        "data": {"source": "jsonl", "name": "/my/x.jsonl"},
    }
    for settings in (other, {}, {"model": {"checkpoint": ""}}):
        data = loaded(card_of(settings, {}, []), tmp_path).data
        assert not (data.base_model or data.license or data.datasets or data.eval_results)
    text = (tmp_path / "README.md").read_text()
    assert "null" not in text and "## Training" not in text


def test_license_of_a_stranger_is_not_guessed(tmp_path):
    data = loaded(card_of({"model": {"checkpoint": "somebody/Qwen3-0.6B"}}, {}, []), tmp_path).data
    assert data.base_model == "somebody/Qwen3-0.6B" and data.license is None


def test_local_file_of_questions_is_named_without_its_folder():
    data = {"source": "jsonl", "name": "/home/me/secret/questions.jsonl", "split": "train"}
    text = front_matter(card_of({"eval": {"data": data}}, RESULT, []), "m", "transformers")
    assert "questions.jsonl" in text and "secret" not in text


HOSTILE = [
    "---\nlicense: mit\n---\n# x",
    "a: b\n- c",
    "<script>alert(1)</script>",
    "| x |\n# h",
    "{{ y }}",
    "'\"\\",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_leaves_its_place(tmp_path, text):
    settings = {
        "data": {"source": "hf", "name": text, "instruction": text},
        "eval": {"data": {"source": "hf", "name": text, "subset": text, "split": text}},
    }
    card = loaded(card_of(settings, RESULT, [{"step": 1, "reward": text}]), tmp_path)
    assert card.data.datasets == [text] and card.data.license is None
    assert card.data.eval_results[0].dataset_split == text
    assert "<script" not in card.text and "license: mit" not in card.text.splitlines()
    assert [row for row in card.text.splitlines() if row.startswith("#")] == [
        *("# Qwen3ForCausalLM written by step_grpo", "## Measured", "## Training", "## Settings"),
    ]


@pytest.mark.parametrize("count", [0, 1, 2, ROWS, ROWS + 1, 100])
def test_curve_has_first_and_last_step_and_never_one_twice(count):
    steps = [row["step"] for row in curve_of(lines(count))]
    assert len(steps) == min(count, ROWS) and sorted(set(steps)) == steps
    assert steps[:1] + steps[-1:] == ([1, count] if count else [])
    assert all(tuple(row) == CURVE for row in curve_of(lines(count)))


def test_card_of_a_finished_run_holds_its_results_and_its_course(finished_run):
    card = ModelCard.load(finished_run.workdir / "export" / "README.md")
    after = finished_run.result["after"]
    values = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert values == {name: after[name] for name in ("accuracy", "tokens", "steps")}
    assert card.data.license == "apache-2.0" and card.data.base_model is None  # what ships in the package
    for line in finished_run.metrics:
        assert any(
            row.startswith(f"| {line['step']} | {line['reward']:.6g} |") for row in card.text.splitlines()
        )


def test_export_of_a_run_has_the_card_that_the_run_wrote(finished_run, tmp_path):
    again = export(finished_run.workdir, tmp_path / "out")
    assert (again / "README.md").read_text() == (finished_run.workdir / "export" / "README.md").read_text()


def test_checkpoint_on_the_way_has_its_part_of_the_course_and_no_results(finished_run):
    settings = finished_run.config.to_dict()
    card = run_card(finished_run.workdir / "checkpoints" / "000001", settings)
    assert [row["step"] for row in card["curve"]] == [1] and not card["measured"]
    last = run_card(finished_run.workdir / "checkpoints" / "000002", settings)
    assert last["measured"]["after"] == finished_run.result["after"]
    assert len(read_metrics(finished_run.workdir / "metrics.jsonl")) == len(last["curve"]) == 2
