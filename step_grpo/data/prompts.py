"""Questions to prompt token ids, through the tokenizer's own chat template, with thinking on."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step_grpo import hub
from step_grpo.data.sources import Question
from step_grpo.errors import UserError

THINK_END = "</think>"  # closes the thinking, in the templates of all models that are taken
Tokenizer = Any  # transformers' PreTrainedTokenizerBase, which takes seconds to import


@dataclasses.dataclass(frozen=True)
class EncodedPrompt:
    """A question and the token ids that ask it."""

    question: Question
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts that are short enough, in the order of the questions, and how many were not."""

    kept: list[EncodedPrompt]
    dropped: int


def load_tokenizer(name: str, *, where: str = "config.model.tokenizer") -> Tokenizer:
    """Loads a tokenizer from a local folder or, by name, from the Hugging Face Hub.

    Raises:
        UserError: no such folder, not a tokenizer, or a name that neither the cache nor the Hub has.
    """
    if not name:
        raise UserError(f"{where} is empty; name the folder or the Hub name of a tokenizer")
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists() or hub.looks_like_path(name):
            raise UserError(f"{where}: no such folder: {name}")
        if hub.offline() and not _cached(name):
            raise hub.failure()(
                f"{where}: {name!r} is no local folder, not in the cache, and the Hugging Face Hub cannot be "
                "reached; check the name and the network, or name a local folder"
            )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that it found no PyTorch
    from transformers import AutoTokenizer  # noqa: PLC0415 (seconds of import)

    place = str(folder) if folder.is_dir() else name
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # the library raises whatever its file formats do
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{where}: cannot load a tokenizer from {name!r} ({reason}); it takes a folder or a Hub name "
            "with tokenizer.json and tokenizer_config.json"
        ) from error


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        return isinstance(try_to_load_from_cache(name, "tokenizer_config.json"), str)
    except HFValidationError:  # not even a possible Hub name
        return False


def encode_prompts(
    tokenizer: Tokenizer, questions: Sequence[Question], *, instruction: str, max_prompt_tokens: int
) -> Prompts:
    """Asks each question as one user message: the trimmed question, then the instruction.

    The template decides how thinking opens: Qwen3's leaves `<think>` to the model, R1-Distill's ends the
    prompt with it.

    Raises:
        UserError: the tokenizer has no chat template; the model was trained with one, and without it every
            figure would be of another model.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"config.model.tokenizer: {tokenizer.name_or_path!r} has no chat template; use a tokenizer whose "
            "tokenizer_config.json (or chat_template.jinja) holds the model's own"
        )
    if not questions:
        return Prompts([], 0)
    chats = [[{"role": "user", "content": q.question.strip() + instruction}] for q in questions]
    encoded = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, enable_thinking=True, tokenize=True, return_dict=False
    )
    prompts = [EncodedPrompt(q, tuple(ids)) for q, ids in zip(questions, encoded, strict=True)]
    kept = [prompt for prompt in prompts if len(prompt.ids) <= max_prompt_tokens]
    return Prompts(kept, len(prompts) - len(kept))


def checksum(prompts: Sequence[EncodedPrompt]) -> str:
    """How many prompts there are, and a number that stands for their tokens, answers and order."""
    held = hashlib.sha256()
    for prompt in prompts:
        held.update(repr((prompt.ids, dataclasses.astuple(prompt.question))).encode())
    return f"{len(prompts)} prompts with the checksum {held.hexdigest()[:16]}"


def think_end_id(tokenizer: Tokenizer) -> int:
    """The id of `</think>`, which closes the thinking.

    Raises:
        UserError: the tokenizer spells it with several tokens, so the model is no reasoning model of the
            supported kind.
    """
    ids = tokenizer.encode(THINK_END, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(
            f"config.model.tokenizer: {tokenizer.name_or_path!r} has no single token '</think>' (it gives "
            f"{len(ids)}); use a model that thinks between <think> and </think>"
        )
    return ids[0]
