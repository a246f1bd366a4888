"""Makes the model of the study: `python -m step_grpo.sft --config=configs/study_sft.py`.

A Qwen3 of one million weights learns three families of generated problems (see step_grpo/data/tasks): chains
of additions, linear equations and a search, together with the habit of checking itself again and again: at
least three times after the last step, and rarely less, so that there is something to unlearn. Its author
slips half as often as those of the families do, so that most checks are for nothing. The result,
`workdir/study_sft/export`, ships as `step_grpo/assets/study`; it takes half an hour on two cores.
"""

from step_grpo.config import sft_config


def get_config():
    config = sft_config()
    config.tasks = "chains,equations,search"
    config.habits.least_checks = 3
    config.habits.carelessness = 0.5
    config.steps = 4000
    config.rows = 16
    config.row_length = 320
    config.remat = "none"
    config.learning_rate = 2e-3
    config.warmup_steps = 100
    config.architecture = {
        "model_type": "qwen3",
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }
    return config.lock()
