"""The whole method on a laptop: `python -m step_grpo.main --config=configs/tiny.py`.

Trains the built-in tiny model, which over-thinks arithmetic (see configs/tiny_sft.py), to stop in time. Takes
a few minutes on two cores and downloads nothing.
"""

from step_grpo.config import data_config, small_config


def get_config():
    config = small_config()
    config.steps = 12
    config.prompts_per_step = 48
    config.save_every = 6

    config.model.checkpoint = "builtin:tiny"

    config.data = data_config(source="arithmetic", split="train", count=10_000)

    config.rollout.max_prompt_tokens = 32
    config.rollout.max_response_tokens = 256

    config.grpo.learning_rate = 2e-4
    config.grpo.row_length = 320

    config.imitation.learning_rate = 2e-4

    config.eval.data = data_config(source="arithmetic", split="test", count=1024)
    config.eval.questions = 1024
    config.eval.max_response_tokens = 256
    return config.lock()
