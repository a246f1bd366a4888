"""Step-GRPO on Qwen3-0.6B, sized for the single TPU of a Colab notebook: a v5e chip with 16 GB.

    python -m step_grpo.main --config=configs/qwen3_0p6b_colab.py            # the run
    python -m step_grpo.main --config=configs/qwen3_0p6b_colab.py:runlocal   # two steps, tiny random model
    python -m step_grpo.fit --config=configs/qwen3_0p6b_colab.py --topology=v5e:1x1   # and v6e:1x1

GSM8K's questions are short: 256 + 3072 tokens instead of the paper's 2048 + 16384, and small batches.
"""

from ml_collections import ConfigDict

from step_grpo.config import base_config, data_config, variant

GSM8K = {
    "name": "openai/gsm8k",
    "subset": "main",
    "prompt_column": "question",
    "answer_column": "answer",
    "answer_pattern": "#### (.*)",
}


def get_config(arg: str = "") -> ConfigDict:
    config = base_config().unlock()
    config.model.checkpoint = "Qwen/Qwen3-0.6B"
    config.data = data_config(**GSM8K)
    config.prompts_per_step, config.grpo.prompts_per_update = 32, 16
    config.save_every = 5
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 256, 3072
    config.grpo.row_length = 256 + 3072
    config.grpo.moments_dtype = "bfloat16"
    config.eval.data = data_config(**{**GSM8K, "split": "test"})
    config.eval.questions, config.eval.max_response_tokens = 200, 3072
    return variant(config, arg, model_type="qwen3", tied=True)
