"""One run of the study: `python -m step_grpo.main --config=configs/study_run.py`.

Trains the model that ships for the study, which over-thinks chains of additions, linear equations and a
search (see configs/study_sft.py). `configs/study_tiny.py` takes every row of its table from here.

Steps, learning rate and `rollout.delta` were chosen on validation questions. The probes of a model so small
are surer than it is right: with a delta of 0.95 nine rollouts in ten exit at their first trigger from the
first step on, all of a group have the same number of steps, and what is left to learn is little. Twice the
learning rate for half the steps cost two or three points of accuracy, in runs of one seed.

In float32 the sampler's log-probs are the trainer's, but for rounding (`policy_gap` in `metrics.jsonl` is
1e-7): computing them once more would change nothing. Micro-batches of 8 rows are faster on two cores than 16
(docs/performance.md), and the last one of an update has fewer rows that are empty.
"""

from step_grpo.config import data_config, small_config

TASKS = {"source": "tasks", "name": "chains,equations,search"}


def get_config():
    config = small_config()
    config.steps = 40
    config.prompts_per_step = 24
    config.save_every = 20

    config.model.checkpoint = "builtin:study"
    config.model.remat = "none"

    config.data = data_config(**TASKS, split="train", count=9_000)

    config.rollout.delta = 0.9999
    config.rollout.max_prompt_tokens = 48
    config.rollout.max_response_tokens = 320

    config.grpo.learning_rate = 1e-4
    config.grpo.old_logprobs = "sampler"
    config.grpo.rows = 8
    config.grpo.row_length = 384

    config.imitation.learning_rate = 1e-4

    config.eval.data = data_config(**TASKS, split="test", count=300)
    config.eval.questions = 300
    config.eval.max_response_tokens = 320
    return config.lock()
