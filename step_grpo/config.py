"""The one config system: every field, its paper default, and the checks that name a wrong value.

`base_config` holds the settings of the paper (METHOD: arXiv 2604.16890); each file of `configs/` is a few
lines over it. Configs are locked, so a mistyped field is an error and not a silent default.
"""

from ml_collections import ConfigDict

from step_grpo.errors import UserError


def data_config(**fields) -> ConfigDict:
    """Where questions come from; `fields` replace the defaults.

    source: `hf`, `tfds`, `jsonl`, `parquet` or `arithmetic`; name: Hub name, TFDS name, or path;
    prompt_column and answer_column take dotted paths (`reward_model.ground_truth`, `prompt.0.content`);
    answer_pattern: regex whose first group is the answer (empty: the whole column);
    instruction: appended to the trimmed question; bad_rows: `error` or `drop`.
    """
    config = ConfigDict(
        {
            "source": "hf",
            "name": "",
            "subset": "",
            "split": "train",
            "prompt_column": "problem",
            "answer_column": "answer",
            "answer_pattern": "",
            "instruction": " Please reason step by step, and put your final answer within \\boxed{}.",
            "bad_rows": "error",
        }
    )
    config.update(fields)
    return config.lock()


def base_config() -> ConfigDict:
    """The paper's run: Qwen3-8B on DAPO-Math-17k (METHOD, section 4)."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 100  # rollout batches
    config.prompts_per_step = 512
    config.save_every = 10  # steps between checkpoints
    config.keep_checkpoints = 3
    config.export_dtype = "bfloat16"

    config.model = ConfigDict()
    config.model.checkpoint = "Qwen/Qwen3-8B"  # folder, Hub name, or `builtin:tiny`; empty: random weights
    config.model.tokenizer = ""  # folder or Hub name; empty: the checkpoint's own
    config.model.architecture = ConfigDict()  # fields of a HF config.json, for random weights only
    config.model.dtype = "bfloat16"  # of the compute; master weights are float32

    config.data = data_config(
        name="BytedTsinghua-SIA/DAPO-Math-17k",
        prompt_column="prompt.0.content",
        answer_column="reward_model.ground_truth",
    )

    config.rollout = ConfigDict()
    config.rollout.samples = 5  # G, completions a prompt
    config.rollout.lanes = 64
    config.rollout.max_prompt_tokens = 2048
    config.rollout.max_response_tokens = 16384
    config.rollout.temperature = 1.0
    config.rollout.top_p = 1.0
    config.rollout.exit = "confidence"  # or `none`: plain sampling
    config.rollout.delta = 0.95
    config.rollout.strict = True
    config.rollout.triggers = ("Wait",)
    config.rollout.inducing_prompt = "\n**Final Answer**\n\\boxed"
    config.rollout.think_ratio = 0.9
    config.rollout.max_probes = 10
    config.rollout.max_probe_tokens = 20
    config.rollout.budget_margin = 50  # a probe this close to the thinking budget ends the thinking
    config.rollout.max_repetitions = 3

    config.reward = ConfigDict()
    config.reward.name = "step_aware"  # or `accuracy`, `length_penalty`
    config.reward.alpha = 0.9
    config.reward.beta = 0.5
    config.reward.baseline = "correct"  # or `all`
    config.reward.length_penalty = 0.5
    config.reward.grading_workers = 2
    config.reward.grading_deadline = 5.0  # seconds an answer

    config.grpo = ConfigDict()
    config.grpo.prompts_per_update = 128
    config.grpo.learning_rate = 1e-6
    config.grpo.b1 = 0.9
    config.grpo.b2 = 0.999
    config.grpo.weight_decay = 1e-2
    config.grpo.grad_clip = 1.0
    config.grpo.clip_low = 0.2
    config.grpo.clip_high = 0.3
    config.grpo.dual_clip = 3.0
    config.grpo.kl_coef = 1e-2
    config.grpo.old_logprobs = "trainer"  # or `sampler`
    config.grpo.train_forced_tokens = True
    config.grpo.row_length = 18432  # tokens a packed row
    config.grpo.rows = 1  # packed rows a micro-batch
    config.grpo.logprob_chunk = 1024  # tokens whose logits exist at one time

    config.eval = ConfigDict()
    config.eval.data = data_config(name="HuggingFaceH4/MATH-500", split="test")
    config.eval.questions = 500  # the first so many of the split; 0: all
    config.eval.temperature = 0.6
    config.eval.top_p = 0.95
    config.eval.max_response_tokens = 16384
    return config.lock()


def sft_config() -> ConfigDict:
    """Supervised fine-tuning on the arithmetic corpus (`step_grpo.sft`)."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 1000
    config.rows = 16  # packed rows a step
    config.row_length = 320  # tokens a row
    config.learning_rate = 1e-3
    config.warmup_steps = 100
    config.b1 = 0.9
    config.b2 = 0.98
    config.weight_decay = 1e-2
    config.grad_clip = 1.0
    config.dtype = "float32"
    config.log_every = 20
    config.export_dtype = "bfloat16"
    config.architecture = ConfigDict()
    config.instruction = data_config().instruction
    return config.lock()
