"""The whole method on a laptop: `python -m step_grpo.main --config=configs/tiny.py`.

Trains the built-in tiny model, which over-thinks arithmetic (see configs/tiny_sft.py), to stop in time. Takes
a few minutes on two cores and downloads nothing.
"""

from step_grpo.config import base_config, data_config


def get_config():
    config = base_config().unlock()
    config.steps = 12
    config.prompts_per_step = 48
    config.save_every = 6
    config.export_dtype = "float32"

    config.model.checkpoint = "builtin:tiny"
    config.model.dtype = "float32"

    config.mesh.data, config.mesh.fsdp = 0, 1  # the model is small: a copy on every device

    config.data = data_config(source="arithmetic", split="train", count=10_000)

    config.rollout.samples = 8
    config.rollout.lanes = 128
    config.rollout.max_prompt_tokens = 32
    config.rollout.max_response_tokens = 256
    config.rollout.budget_margin = 16

    config.grpo.prompts_per_update = 24
    config.grpo.learning_rate = 2e-4
    config.grpo.row_length = 320
    config.grpo.rows = 16

    config.imitation.learning_rate = 2e-4

    config.verifier_training.prefixes = 2
    config.verifier_training.learning_rate = 5e-4

    config.eval.data = data_config(source="arithmetic", split="test", count=1024)
    config.eval.questions = 1024
    config.eval.max_response_tokens = 256
    return config.lock()
