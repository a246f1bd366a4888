"""Step-GRPO on Qwen3-32B with DAPO-Math-17k and the paper's settings (arXiv 2604.16890).

    python -m step_grpo.main --config=configs/qwen3_32b.py            # the run, the same line on every host
    python -m step_grpo.main --config=configs/qwen3_32b.py:runlocal   # two steps, tiny random model, any CPU

Hardware: not measured. Float32 weights, gradients and Adam, a bfloat16 copy to compute with and the bfloat16
reference are 20 bytes a parameter, so about 656 GB over all chips before activations and the rollout cache.
"""

from ml_collections import ConfigDict

from step_grpo.config import base_config, variant


def get_config(arg: str = "") -> ConfigDict:
    config = base_config()
    config.model.checkpoint = "Qwen/Qwen3-32B"
    return variant(config, arg, model_type="qwen3", tied=False)
