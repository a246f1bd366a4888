"""The config of a study: its rows, and what all of them share."""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from step_grpo.errors import UserError

KINDS = ("untrained", "train", "imitate", "verifier")


def row(
    title: str, kind: str = "train", train: Sequence[str] = (), evaluate: Sequence[str] = ()
) -> ConfigDict:
    """A row of the table.

    Args:
        title: as it stands in the table.
        kind: `untrained`, the checkpoint as it is; `train`, by `step_grpo.main`; `imitate`, fine-tuned on its
            own correct truncated completions by `step_grpo.imitate`; `verifier`, the checkpoint as it is, cut
            short by a verifier that `step_grpo.train_verifier` trains.
        train: overrides of the config while training, such as `reward.beta=0`.
        evaluate: overrides while evaluating, such as `eval.exit=confidence`.
    """
    return ConfigDict({"title": title, "kind": kind, "train": tuple(train), "evaluate": tuple(evaluate)})


def study_config(rows: dict[str, ConfigDict], **fields: Any) -> ConfigDict:
    """A study of these rows; `fields` replace the defaults.

    config: the config file of every run; checkpoint: what every training begins with; seeds: of each row;
    order: the rows of the table, the first is what the others are compared with; also_against: rows that all
    are compared with in a table of their own; train, evaluate: overrides for all trainings and all
    evaluations; splits: name -> overrides; pictured: the split of the picture; probed_questions: so many of
    its questions are probed, one completion each, 0 for all of all;
    reliability: rows whose reliability curves are drawn; seconds: expected of a command, by its kind.
    """
    config = ConfigDict(
        {
            "config": "configs/tiny.py",
            "checkpoint": "builtin:tiny",
            "seeds": (0, 1, 2),
            "order": tuple(rows),  # a ConfigDict sorts its fields
            "also_against": (),
            "train": (),
            "evaluate": (),
            "splits": {"test": ()},
            "pictured": "test",
            "probed_questions": 256,
            "reliability": tuple(rows)[:3],
            "seconds": {
                **{"train": 180.0, "imitate": 120.0, "verifier": 240.0},
                **{"evaluate": 60.0, "probe": 30.0},
            },
            "rows": rows,
        }
    )
    config.update(fields)
    return config.lock()


def validate_study(config: ConfigDict) -> None:
    """Checks what a study would only find out in the middle of the night.

    Raises:
        UserError: naming the field, its value and what would be right.
    """

    def require(ok: bool, field: str, value: Any, right: str) -> None:
        if not ok:
            raise UserError(f"config.{field} is {value!r}; it must be {right}")

    known = bool(len(config.order)) and len(set(config.order)) == len(config.order)
    known = known and set(config.order) <= set(config.rows)
    require(known, "order", config.order, f"rows, each once; there are {', '.join(config.rows)}")
    seeds = list(config.seeds)
    distinct = bool(seeds) and len(set(seeds)) == len(seeds)
    require(distinct, "seeds", config.seeds, "different numbers, at least one")
    require(config.pictured in config.splits, "pictured", config.pictured, "one of config.splits")
    probed = config.probed_questions
    require(probed >= 0, "probed_questions", probed, "a number of questions; 0 for every completion")
    compared = set(config.also_against) <= set(config.order)
    require(compared, "also_against", config.also_against, f"rows; there are {', '.join(config.order)}")
    drawn = set(config.reliability) <= set(config.rows)
    require(drawn, "reliability", config.reliability, f"rows; there are {', '.join(config.rows)}")
    for kind, seconds in config.seconds.items():
        require(seconds > 0, f"seconds.{kind}", seconds, "a number above 0")
    overrides = {"train": config.train, "evaluate": config.evaluate}
    overrides |= {f"splits.{name}": split for name, split in config.splits.items()}
    for name, settings in config.rows.items():
        require(settings.kind in KINDS, f"rows.{name}.kind", settings.kind, " or ".join(map(repr, KINDS)))
        useless = settings.kind == "untrained" and len(settings.train)
        require(not useless, f"rows.{name}.train", settings.train, "empty, for the row is not trained")
        overrides |= {f"rows.{name}.{part}": settings[part] for part in ("train", "evaluate")}
    for field, texts in overrides.items():
        ok = not isinstance(texts, str) and all(isinstance(text, str) and "=" in text for text in texts)
        require(ok, field, texts, "a tuple of overrides, such as ('reward.beta=0',)")
