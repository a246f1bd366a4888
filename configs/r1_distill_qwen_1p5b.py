"""Step-GRPO on DeepSeek-R1-Distill-Qwen-1.5B with DAPO-Math-17k and the paper's settings (arXiv 2604.16890).

    python -m step_grpo.main --config=configs/r1_distill_qwen_1p5b.py            # the same line on every host
    python -m step_grpo.main --config=configs/r1_distill_qwen_1p5b.py:runlocal   # two steps, random weights

Not strict: that mode answers Qwen3's over-confidence. This chat template opens `<think>` in the prompt.
Hardware: not measured. Float32 weights, gradients and Adam, a bfloat16 copy to compute with and the bfloat16
reference are 20 bytes a parameter, so about 36 GB over all chips before activations and the rollout cache.
"""

from ml_collections import ConfigDict

from step_grpo.config import base_config, variant


def get_config(arg: str = "") -> ConfigDict:
    config = base_config()
    config.model.checkpoint = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    config.rollout.strict = False
    return variant(config, arg, model_type="qwen2", tied=False)
