"""Every method on the built-in tasks: `python -m step_grpo.study --config=configs/study_tiny.py`.

The rows of the paper's table and its ablations, each trained with three seeds, and evaluated on questions
that no row was trained on: of the kind of the training (`test`), and harder ones (`ood`). It takes hours on
two cores. `:extended` behind the file's name adds other losses, strengths of the reward and thresholds, all
with the first seed alone; in the same workdir it goes on from the rows that are finished. `:long` trains
Step-GRPO and GRPO+LP three times as long, until no check is left and what was lost on the way is learnt
again; its questions are a draw of their own, and many, and it needs a workdir of its own. `:short` takes
minutes and says nothing.

What all rows share is in `configs/study_run.py`, what is a method's own as in its paper. Five settings were
chosen, all on validation questions: the number of steps and the learning rate, which all trainings share, the
delta of Step-GRPO's rollouts, the threshold of the sufficiency assessment, and the penalty of GRPO+LP, with
which it needs about the tokens of Step-GRPO. So were the number of steps of `:long` and its weaker penalty.
The questions of the tables are draws of their own, which nothing was ever chosen on.
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
    "grpo": row("GRPO", train=[*PLAIN, "reward.name=accuracy"]),
    "grpo_lp": row("GRPO+LP", train=penalised(1.0)),
    "grpo_lambda": row("GRPO-lambda", train=[*PLAIN, "reward.name=grpo_lambda"]),
    "step_grpo": row("Step-GRPO"),
    "no_step_reward": row("  without the step reward", train=["reward.beta=0"]),
    "no_dynamic_rollout": row("  without the dynamic rollout", train=PLAIN),
    "mean_over_all": row("  mean over all samples", train=["reward.baseline=all"]),
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


LONG = ("steps=120",)  # three times as many


def asked(count):
    """Overrides that evaluate on so many questions."""
    return f"eval.data.count={count}", f"eval.questions={count}"


OOD = asked(150)  # as many as 300 of `test` leave time for
SECONDS = {"train": 220.0, "imitate": 80.0, "verifier": 240.0, "evaluate": 16.0, "probe": 15.0}


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


def whole_study(rows, seeds=(0, 1, 2), draw=1, test=(), ood=OOD, train=(), drawn="grpo", seconds=SECONDS):
    """A study of these rows.

    Args:
        rows: name -> row.
        seeds: of every row.
        draw: of its questions; draw 0 was looked at while settings were chosen.
        test: overrides of the evaluations on the split `test`.
        ood: overrides of those on the split `ood`.
        train: overrides of all trainings.
        drawn: the row whose reliability stands beside those of the untrained model and of Step-GRPO.
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
        reliability=("vanilla", drawn, "step_grpo"),
        seconds=seconds,
    )


def get_config(arg=""):
    if arg == "short":
        return short_study()
    if arg == "extended":
        return whole_study({**ROWS, **EXTENDED}, seeds=(0,))
    if arg == "long":
        # On two draws of 300 questions two models were 2.2 and 0.1 points apart; hence many, freshly drawn.
        weak = [*penalised(0.1), "reward.closed_thinking=True"]
        rows = {
            "vanilla": ROWS["vanilla"],
            "grpo_lp": ROWS["grpo_lp"],
            "grpo_lp_weak": row("GRPO+LP, penalty 0.1, thinking closed", train=weak),
            "step_grpo": ROWS["step_grpo"],
        }
        many = {"test": asked(1200), "ood": asked(600)}
        return whole_study(
            rows,
            draw=5,
            **many,
            train=LONG,
            drawn="grpo_lp",
            seconds=SECONDS | {"train": 420.0, "evaluate": 40.0},
        )
    if arg:
        raise UserError(
            f"--config: unknown argument {arg!r} after the colon; there are 'extended', 'long' and 'short'"
        )
    return whole_study(ROWS)
