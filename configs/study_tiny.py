"""Every method on the built-in tasks: `python -m step_grpo.study --config=configs/study_tiny.py`.

The rows of the paper's table and its ablations, each trained with three seeds until no check is left to leave
out, and evaluated on questions that no row was trained on: of the kind of the training (`test`), and harder
ones (`ood`). It takes hours on two cores. Behind the file's name:

- `:penalty` adds GRPO+LP with a weaker penalty, and with fewer updates; in the same workdir it goes on from
  the rows that are finished.
- `:early` stops all trainings after a third of the updates, and adds rows of neighbouring methods. It needs a
  workdir of its own.
- `:extended` adds other losses, strengths of the reward and thresholds to those of `:early`, all with the
  first seed alone; in the workdir of `:early` it goes on from there.
- `:short` takes minutes and says nothing.

What all rows share is in `configs/study_run.py`, what is a method's own as in its paper. Six settings were
chosen, all on validation questions: the learning rate and both numbers of updates, which all trainings share,
the delta of Step-GRPO's rollouts, the threshold of the sufficiency assessment, and the penalty of GRPO+LP,
with which it needs about the tokens of Step-GRPO in `:early`. Where GRPO+LP stops in `:penalty` was chosen by
the length of its training rollouts. The questions of the tables are draws of their own, which nothing was
chosen on.
"""

from step_grpo.errors import UserError
from step_grpo.study_config import row, study_config

CONFIG, CHECKPOINT = "configs/study_run.py", "builtin:study"
PLAIN = ("rollout.exit=none",)  # rollouts that nothing cuts short
DEER = ("rollout.delta=0.95",)  # of its paper
# The tiny tokenizer has these two phrases, and spells the words of the defaults letter by letter.
VERDICTS = ("rollout.yes_words=(', yes',)", "rollout.no_words=(', not ',)")
# A line is a step. FlashThink checks every one, so more often than the ten times of a probe.
LINES = (r"rollout.verifier.delimiters=('\n',)", "rollout.verifier.question=?", "rollout.max_probes=40")
VERIFIER = (*VERDICTS, *LINES)


def penalised(strength):
    """Overrides that train with GRPO+LP."""
    return *PLAIN, "reward.name=length_penalty", f"reward.length_penalty={strength}"


ROWS = {
    "vanilla": row("vanilla", "untrained"),
    "deer": row("DEER", "untrained", evaluate=[*DEER, "eval.exit=confidence"]),
    "deer_sft": row("DEER+SFT", "imitate", train=DEER),
    "grpo": row("GRPO", train=[*PLAIN, "reward.name=accuracy"]),
    "grpo_lp": row("GRPO+LP", train=penalised(1.0)),
    "step_grpo": row("Step-GRPO"),
    "no_step_reward": row("  without the step reward", train=["reward.beta=0"]),
    "no_dynamic_rollout": row("  without the dynamic rollout", train=PLAIN),
    "mean_over_all": row("  mean over all samples", train=["reward.baseline=all"]),
}

NEIGHBOURS = {
    "flashthink_untrained": row(
        "FlashThink, the model its own verifier",
        "untrained",
        evaluate=[*VERIFIER, "eval.exit=verifier", f"rollout.verifier.checkpoint={CHECKPOINT}"],
    ),
    "flashthink": row("FlashThink", "verifier", train=VERIFIER, evaluate=VERIFIER),
    "sufficiency": row(
        "sufficiency assessment",
        "untrained",
        evaluate=[
            *VERDICTS,
            *("eval.exit=sufficiency", "rollout.sufficiency.question=?", "rollout.sufficiency.threshold=50"),
        ],
    ),
    "grpo_lambda": row("GRPO-lambda", train=[*PLAIN, "reward.name=grpo_lambda"]),
}

# A tenth of the penalty leaves more of the answer's wording; closing the thinking is made part of the format.
PENALTY = {
    "grpo_lp_weak": row(
        "GRPO+LP, penalty 0.1, thinking closed", train=[*penalised(0.1), "reward.closed_thinking=True"]
    ),
    # It then needs about the tokens of Step-GRPO, and with more updates fewer.
    "grpo_lp_stopped": row("GRPO+LP, stopped after 64 updates", train=[*penalised(1.0), "steps=64"]),
}

EXTENDED = {
    "grpo_lp_0p5": row("GRPO+LP, penalty 0.5", train=[*PLAIN, "reward.name=length_penalty"]),
    "forced_masked": row("  forced tokens masked", train=["grpo.train_forced_tokens=False"]),
    "deer_0p99": row(
        "DEER, delta 0.99", "untrained", evaluate=["rollout.delta=0.99", "eval.exit=confidence"]
    ),
    "delta_0p999": row("  delta 0.999", train=["rollout.delta=0.999"]),
    "delta_0p99": row("  delta 0.99", train=["rollout.delta=0.99"]),
    "delta_0p95": row("  delta 0.95", train=["rollout.delta=0.95"]),
    "triggers": row("  triggers Wait and check", train=["rollout.triggers=('Wait','check')"]),
    "alpha_0p7": row("  alpha 0.7", train=["reward.alpha=0.7"]),
    "beta_0p25": row("  beta 0.25", train=["reward.beta=0.25"]),
    "beta_1": row("  beta 1", train=["reward.beta=1.0"]),
    "dr_grpo": row("  Dr. GRPO", train=["grpo.advantage=dr_grpo", "grpo.loss_mean=constant"]),
    "rloo": row("  RLOO", train=["grpo.advantage=rloo"]),
    "gspo": row("  GSPO", train=["grpo.ratio=sequence", "grpo.loss_mean=sequence"]),
    "dynamic_sampling": row("  DAPO's dynamic sampling", train=["grpo.dynamic_sampling=3"]),
}


def asked(count):
    """Overrides that evaluate on so many questions."""
    return f"eval.data.count={count}", f"eval.questions={count}"


SECONDS = {"train": 450.0, "imitate": 115.0, "evaluate": 20.0, "probe": 13.0}
EARLY_SECONDS = {"train": 220.0, "imitate": 220.0, "verifier": 380.0, "evaluate": 20.0, "probe": 15.0}


def short_study():
    """A few minutes, to see how it goes: what it says of the methods is nothing."""
    few = asked(32)
    return study_config(
        {name: ROWS[name] for name in ("vanilla", "deer_sft", "step_grpo")},
        config=CONFIG,
        checkpoint=CHECKPOINT,
        seeds=(0,),
        train=("steps=1", "eval.data.split=validation", *few),
        evaluate=("eval.samples=2", *few),
        seconds={"train": 60.0, "imitate": 50.0, "evaluate": 25.0, "probe": 35.0},
    )


def whole_study(rows, draw, test, ood, reliability, seeds=(0, 1, 2), train=(), seconds=SECONDS):
    """A study of these rows.

    Args:
        rows: name -> row.
        draw: of its questions; draw 0 was looked at while settings were chosen.
        test: overrides of the evaluations on the split `test`.
        ood: overrides of those on the split `ood`.
        reliability: the rows whose reliability is drawn.
        seeds: of every row.
        train: overrides of all trainings.
        seconds: what each kind of command takes, until one has run.
    """
    fresh = f"eval.data.seed={draw}"
    return study_config(
        rows,
        config=CONFIG,
        checkpoint=CHECKPOINT,
        seeds=seeds,
        # The curves of a training are drawn on another split than the table, and on few questions.
        train=(*train, "eval.data.split=validation", "eval.questions=66"),
        evaluate=("eval.samples=4",),
        splits={
            "test": ("eval.data.split=test", fresh, *test),
            "ood": ("eval.data.split=ood", fresh, *ood),
        },
        also_against=("step_grpo",),
        reliability=reliability,
        seconds=seconds,
    )


def main_study(rows):
    """These rows, trained until no check is left and what was lost on the way is learnt again."""
    # DEER+SFT sees the questions of 40 updates once: those of 120 would leave no room within three hours.
    rows = {**rows, "deer_sft": row("DEER+SFT", "imitate", train=[*DEER, "steps=40"])}
    probed = ("vanilla", "deer_sft", "no_step_reward")  # those that still write a trigger
    many = {"test": asked(600), "ood": asked(150)}
    return whole_study(rows, draw=6, **many, reliability=probed, train=("steps=120",))


def early_study(rows, **fields):
    """These rows after a third of the updates, as many as `configs/study_run.py` has."""
    fields |= {"reliability": ("vanilla", "grpo", "step_grpo"), "seconds": EARLY_SECONDS}
    return whole_study(rows, draw=1, test=(), ood=asked(150), **fields)


STUDIES = {
    "": lambda: main_study(ROWS),
    "penalty": lambda: main_study({**ROWS, **PENALTY}),
    "early": lambda: early_study({**ROWS, **NEIGHBOURS}),
    "extended": lambda: early_study({**ROWS, **NEIGHBOURS, **EXTENDED}, seeds=(0,)),
    "short": short_study,
}


def get_config(arg=""):
    if arg not in STUDIES:
        known = ", ".join(repr(name) for name in STUDIES if name)
        raise UserError(f"--config: unknown argument {arg!r} after the colon; there are {known}")
    return STUDIES[arg]()
