"""Step-GRPO on Qwen3-8B with DAPO-Math-17k and the paper's settings (arXiv 2604.16890).

    python -m step_grpo.main --config=configs/qwen3_8b.py            # the run, the same line on every host
    python -m step_grpo.main --config=configs/qwen3_8b.py:runlocal   # two steps, tiny random model, any CPU

Hardware: nothing was run. Compiled for a slice, its programs need (`python -m step_grpo.fit`):

- v5p:2x2x1, four chips, as it is: 73 of 95.7 GiB a chip, with 32 lanes.
- v6e:2x4, eight chips, with --config.mesh.tensor=4 --config.grpo.moments_dtype=bfloat16: 29 of 31.25 GiB a
  chip, with 32 lanes.
"""

from ml_collections import ConfigDict

from step_grpo.config import base_config, variant


def get_config(arg: str = "") -> ConfigDict:
    config = base_config()
    config.model.checkpoint = "Qwen/Qwen3-8B"
    return variant(config, arg, model_type="qwen3", tied=False)
