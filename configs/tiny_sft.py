"""Makes the tiny model that over-thinks: `python -m step_grpo.sft --config=configs/tiny_sft.py`.

A Qwen3 of one million weights learns chains of additions and subtractions together with the habit of checking
itself again and again. Everything is generated (see step_grpo/data/arithmetic.py). The result,
`workdir/sft/export`, ships as `step_grpo/assets/tiny`; it takes about a quarter of an hour on two cores.
"""

from step_grpo.config import sft_config


def get_config():
    config = sft_config()
    config.steps = 2000
    config.rows = 16
    config.row_length = 320
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
