"""The tokenizer of the tiny model."""

import json
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from step_grpo.cli import load_config
from step_grpo.data.prompts import load_tokenizer, think_end_id
from step_grpo.data.tiny_tokenizer import PHRASES, build_tokenizer
from step_grpo.model.weights import resolve_checkpoint
from step_grpo.sft import corpus_tokenizer

ROOT = Path(__file__).parents[2]

TOKENIZER = build_tokenizer()
PRINTABLE = "".join(c for c in map(chr, range(32, 127))) + "\n"
TAGS = ("<think>", "</think>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


@given(st.lists(st.one_of(st.text(PRINTABLE), st.sampled_from(PHRASES))).map("".join))
def test_printable_text_survives_encoding_and_decoding(text):
    assert TOKENIZER.decode(encode(text)) == text


@given(st.lists(st.one_of(st.text(PRINTABLE, max_size=5), st.sampled_from(TAGS))).map("".join))
def test_text_with_tags_survives_too(text):
    assert TOKENIZER.decode(encode(text)) == text


@pytest.mark.parametrize("digit", string.digits)
def test_digit_is_a_token_of_its_own(digit):
    (alone,) = encode(digit)
    assert encode(f"Compute {digit}{digit}+7").count(alone) == 2 + (digit == "7")


@pytest.mark.parametrize("phrase", [*PHRASES, *TAGS])
def test_phrase_and_tag_are_one_token(phrase):
    assert len(encode(phrase)) == 1


def test_thinking_tags_are_kept_where_special_tokens_are_skipped():
    ids = encode("<think>\n1\n</think>\n\n2<|im_end|>")
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == "<think>\n1\n</think>\n\n2"
    assert think_end_id(TOKENIZER) == encode("</think>")[0]


def test_ends_are_those_of_qwen3():
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_chat_is_qwen3s_with_thinking_left_to_the_model():
    def ask(**options) -> str:
        chat = [{"role": "user", "content": "Q"}]
        return TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **options)

    asked = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert ask() == ask(enable_thinking=True) == asked
    assert ask(enable_thinking=False) == asked + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize("name", ["tiny", "study"])
def test_shipped_tokenizer_is_the_one_that_is_built(name, tmp_path):
    shipped = resolve_checkpoint(f"builtin:{name}")
    built = corpus_tokenizer(load_config(str(ROOT / "configs" / f"{name}_sft.py")))
    built.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((shipped / file).read_text()) == json.loads((tmp_path / file).read_text())
    assert load_tokenizer(str(shipped)).chat_template == built.chat_template
