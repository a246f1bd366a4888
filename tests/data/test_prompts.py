import json
import os
import shutil
import time
from pathlib import Path

import pytest

from step_grpo.data.prompts import encode_prompts, load_tokenizer, think_end_id
from step_grpo.data.sources import Question
from step_grpo.errors import UserError

INSTRUCTION = " Please reason step by step, and put your final answer within \\boxed{}."


@pytest.fixture(scope="module")
def folder() -> Path:
    data = os.environ.get("STEP_GRPO_TEST_DATA")
    if not data:
        pytest.skip("STEP_GRPO_TEST_DATA is not set")
    return Path(data) / "qwen3_tokenizer"


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


def question(text: str, number: int = 0) -> Question:
    return Question(str(number), text, "1")


def encode(tokenizer, questions, instruction=INSTRUCTION, longest=2048):
    return encode_prompts(tokenizer, questions, instruction=instruction, max_prompt_tokens=longest)


def test_qwen3_prompt_is_exactly_the_chat_template_with_thinking_left_to_the_model(tokenizer):
    prompts = encode(tokenizer, [question("  What is 1 + 1?\n")])
    text = tokenizer.decode(prompts.kept[0].ids)
    assert text == (
        "<|im_start|>user\nWhat is 1 + 1? Please reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompts.kept[0].ids[:2] == (151644, 872)  # <|im_start|>, user
    assert all(type(token) is int for token in prompts.kept[0].ids)


def test_a_template_that_opens_the_thinking_is_followed(tokenizer, folder):
    opening = load_tokenizer(str(folder))
    opening.chat_template = (
        "{{ messages[0].content }}<|im_end|>{% if add_generation_prompt %}<think>\n{% endif %}"
    )
    ids = encode(opening, [question("Q")], instruction="").kept[0].ids
    assert opening.decode(ids) == "Q<|im_end|><think>\n"


def test_prompts_in_a_batch_equal_prompts_alone(tokenizer):
    questions = [question("What is 1 + 1?", 0), question("∑" * 40, 1), question("x", 2)]
    together = encode(tokenizer, questions).kept
    alone = [encode(tokenizer, [q]).kept[0] for q in questions]
    assert together == alone


def test_prompt_longer_than_the_limit_is_dropped_and_counted_and_one_at_the_limit_is_kept(tokenizer):
    questions = [question("short", 0), question("long " * 30, 1), question("short too", 2)]
    longest = len(encode(tokenizer, questions[2:]).kept[0].ids)
    prompts = encode(tokenizer, questions, longest=longest)
    assert [prompt.question.id for prompt in prompts.kept] == ["0", "2"]
    assert prompts.dropped == 1
    assert encode(tokenizer, questions, longest=longest - 1).dropped >= 2


def test_no_questions_give_no_prompts(tokenizer):
    assert encode(tokenizer, []).kept == []


def test_qwen3_special_ids(tokenizer):
    assert think_end_id(tokenizer) == 151668
    assert tokenizer.eos_token_id == 151645
    assert tokenizer.pad_token_id == 151643


def test_tokenizer_without_chat_template_is_refused(folder, tmp_path):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    plain = load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"config\.model\.tokenizer: .* has no chat template"):
        encode(plain, [question("Q")])


def test_tokenizer_without_a_think_token_is_refused(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")
    with pytest.raises(UserError, match=r"config\.model\.tokenizer: .*</think>"):
        think_end_id(wrapped)


def test_tokenizer_that_asks_for_code_of_its_own_is_refused_and_its_code_is_not_run(tmp_path):
    marker = tmp_path / "code_was_run"
    (tmp_path / "tokenizer.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenizer.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {}}))
    with pytest.raises(UserError, match=r"config\.model\.tokenizer: cannot load a tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert not marker.exists() and "\n" not in str(caught.value)


def test_unusable_tokenizer_folders_name_their_field(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    for name in ("", str(tmp_path / "none"), str(tmp_path), str(tmp_path / "broken"), __file__):
        with pytest.raises(UserError) as caught:
            load_tokenizer(name)
        assert str(caught.value).startswith("config.model.tokenizer") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["step-grpo-tests/no-such-model", "no such name!"])
def test_unknown_hub_tokenizer_fails_without_retries_where_there_is_no_network(name, monkeypatch, capfd):
    from huggingface_hub import constants

    from step_grpo import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s for another try"))
    hub.offline.cache_clear()
    with pytest.raises(UserError, match=r"config\.model\.tokenizer: .*cannot be reached"):
        load_tokenizer(name)
    hub.offline.cache_clear()
    assert capfd.readouterr().err == ""
