"""The command line of every entry point: flags, the config file, and mistakes told in one line.

`run(main)` takes the command line from the signature of `main`: a parameter `config` is the config file with
its overrides, every other parameter is a flag of its name, and one without a default must be given.

    def main(config: ConfigDict, workdir: Path = Path("workdir")) -> None: ...

    if __name__ == "__main__":
        cli.run(main)

    python -m step_grpo.main --config=configs/tiny.py:arg --config.grpo.learning_rate=3e-6 --workdir=DIR

A mistake of the user is one line on stderr and exit code 2; so is what goes wrong around the program and may
be well later (a full disk, no network), with exit code 75. Anything else keeps its traceback.
"""

import difflib
import errno
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from step_grpo import heap, paths
from step_grpo.errors import TransientError, UserError

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a full or read-only disk
REFUSALS = (401, 403, 404)  # of a bucket: there is none of that name, or it is not ours to write to
SHIPPED = Path(__file__).parent  # a wheel brings `configs/` along, beside this file
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")


def run(main: Callable[..., None], argv: Sequence[str] | None = None) -> None:
    """Calls `main` with what the command line says.

    Exits with 2 after a user's mistake, with 75 where the same line may work later, with 130 after Ctrl-C,
    each told in one line on stderr. One of several processes exits with 1 where anything else goes wrong
    (`distributed.fail`), and never waits for those that wait for it (`distributed.leave`).
    """
    heap.share()
    argv = sys.argv if argv is None else argv
    if {"--help", "-h", "-help"} & set(argv[1:]):
        print(usage(main))
        return
    try:
        main(**parse(main, argv))
    except KeyboardInterrupt:
        _end("stopped by Ctrl-C", 130)
    except Exception as error:
        if told := _told(error):
            _end(f"error: {' '.join(str(told).split())}", told.exit_code)
        from step_grpo import distributed  # noqa: PLC0415 (some commands do without JAX)

        distributed.fail(error)
        raise


def _told(error: Exception) -> UserError | None:
    """An error that is told in one line; None for a bug."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return TransientError(f"{what}; make room or give the rights, and run the same line again")
    return error if isinstance(error, UserError) else None


def _end(said: str, code: int) -> NoReturn:
    print(f"step_grpo: {said}", file=sys.stderr)
    if "step_grpo.distributed" in sys.modules:  # else there are no other processes, and perhaps no JAX
        from step_grpo import distributed  # noqa: PLC0415

        distributed.leave(code)
    sys.exit(code)


def parse(main: Callable[..., None], argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of `main` that a command line gives.

    Args:
        main: its parameters are `config: ConfigDict`, and others of type `str`, `bool` (a flag without a
            value) or `Path` (a folder to write).
        argv: the program's name, then the arguments.

    Raises:
        UserError: an unknown or missing flag, a config file that is missing or fails, an override of a field
            that does not exist or of another type.
    """
    parameters = inspect.signature(main, eval_str=True).parameters
    given, rest = _plain_flags(parameters, argv)
    if "config" in parameters and given["config"] is None and len(rest) > 1:
        raise UserError(f"{rest[1]} needs --config too; give {_example('config')}")
    arguments: dict[str, Any] = {}
    for name, parameter in parameters.items():
        value = given[name]
        if value is None:
            if parameter.default is inspect.Parameter.empty:
                raise UserError(f"--{name} is missing; give {_example(name)}")
        elif name == "config":
            arguments[name] = _override(load_config(value), rest)
        elif parameter.annotation in (str, bool):
            arguments[name] = value
        else:
            arguments[name] = _folder(name, value)
    return arguments


def usage(main: Callable[..., None]) -> str:
    """What `--help` prints: the docstring of the program, and its flags."""
    module = sys.modules[main.__module__]
    program = f"-m {module.__spec__.name}" if module.__spec__ else str(module.__file__)
    lines = [inspect.getdoc(module) or "", "", f"usage: python {program}"]
    for name, parameter in inspect.signature(main, eval_str=True).parameters.items():
        need = "required" if parameter.default is inspect.Parameter.empty else f"default: {parameter.default}"
        example = f"--{name}" if parameter.annotation is bool else _example(name)
        lines.append(f"  {example} ({need})")
    return "\n".join(lines).strip()


def _example(name: str) -> str:
    if name == "config":
        return "--config=configs/NAME.py[:ARG], then --config.FIELD=VALUE for each override"
    return f"--{name}={name.upper()}"


# ---------------------------------------------------------------- flags


def _plain_flags(
    parameters: Mapping[str, inspect.Parameter], argv: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """The values of the flags, and the arguments left over: the overrides of config fields."""
    names = list(parameters)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)  # flags may follow what belongs to an override
    for name, parameter in parameters.items():
        define = flags.DEFINE_boolean if parameter.annotation is bool else flags.DEFINE_string
        define(name, None, "", flag_values=values)
    try:
        rest = values([_underscored(argument, names) for argument in argv], known_only=True)
    except flags.Error as error:
        raise UserError(str(error)) from None
    for argument in rest[1:]:
        if argument.startswith("--") and not ("config" in names and _OVERRIDE.match(argument)):
            raise _unknown_flag(argument, names)
    given = {name: values[name].value for name in names}
    if len(rest) > 1 and not given.get("config") and not rest[1].startswith("-"):
        hint = f"; did you mean --config={rest[1]}?" if "config" in names else ""
        raise UserError(f"unexpected argument {rest[1]!r}{hint}")
    return given, rest


def _underscored(argument: str, names: Sequence[str]) -> str:
    """An argument, `--two-words=VALUE` as `--two_words=VALUE` where that is a flag."""
    flag, equals, value = argument.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    return f"--{name}{equals}{value}" if flag.startswith("--") and name in names else argument


def _unknown_flag(argument: str, names: list[str]) -> UserError:
    name = argument.lstrip("-").partition("=")[0]
    near = difflib.get_close_matches(name.partition(".")[0], names, n=1)
    hint = f"did you mean --{near[0]}?" if near else f"there are {', '.join(f'--{known}' for known in names)}"
    return UserError(f"unknown flag --{name}; {hint}")


def _folder(name: str, value: str) -> Path:
    """A folder that exists or can be made, or one in a bucket that can be written to."""
    if paths.is_remote(value):
        return _folder_in_bucket(name, value)
    path = Path(value).expanduser()
    nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not value or not nearest.is_dir():
        raise UserError(f"--{name}={value}: {nearest} is not a folder; name a folder")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--{name}={value}: {nearest} is not writable; name a folder that is")
    return path


def _folder_in_bucket(name: str, value: str) -> Path:
    if not re.match(r"gs://[^/]+/[^/]", value):
        raise UserError(f"--{name}={value}: name a folder in a bucket, gs://BUCKET/FOLDER")
    probe = paths.folder(value) / ".writable"
    try:
        probe.write_text("")
        probe.unlink(missing_ok=True)
    except ImportError:
        raise UserError(f"--{name}={value}: needs more packages; pip install 'step_grpo[gcs]'") from None
    except Exception as error:  # whatever the client of the bucket raises
        refused = isinstance(error, FileNotFoundError | PermissionError) or (
            getattr(error, "code", None) in REFUSALS
        )
        kind = UserError if refused else TransientError
        raise kind(f"--{name}={value}: cannot be written ({error or type(error).__name__})") from None
    return paths.folder(value)


# ---------------------------------------------------------------- the config file


def load_config(value: str) -> ConfigDict:
    """The locked config of `FILE.py` or `FILE.py:ARG`: what its `get_config()` or `get_config(ARG)` returns.

    A file that is not there is looked for among those that were installed, by the same relative path.

    Raises:
        UserError: no such file, it fails, or it returns no `ConfigDict`.
    """
    name, colon, arg = value.partition(":")
    path = Path(name).expanduser()
    if not path.is_file() and path.parts[:1] == ("configs",) and (SHIPPED / path).is_file():
        path = SHIPPED / path
    if not path.is_file():
        present = [str(other) for other in path.parent.glob("*.py")]
        near = difflib.get_close_matches(str(path), present, n=1)
        raise UserError(f"--config: no such file: {name}{f' (did you mean {near[0]}?)' if near else ''}")
    try:
        get_config = _module(path).get_config
        if colon and not inspect.signature(get_config).parameters:
            raise UserError(f"--config: {name} takes no argument; leave out the colon and {arg!r}")
        config = get_config(arg) if colon else get_config()
    except UserError:
        raise
    except Exception as error:  # whatever the user's file does
        raise UserError(f"--config: {_place(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() of {name} returns {type(config).__name__}, not a ConfigDict")
    return config.lock()


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config: {path} is not a Python file; name one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _place(error: Exception, path: Path) -> str:
    """The file and, where the traceback passes through it, the line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == path.absolute()]
    return f"{path}, line {lines[-1]}" if lines else str(path)


# ---------------------------------------------------------------- overrides


def _override(config: ConfigDict, argv: list[str]) -> ConfigDict:
    """Sets the fields that `--config.FIELD=VALUE` arguments name, each to its own type."""
    for argument in argv[1:]:
        if match := _OVERRIDE.match(argument):
            _check_field(config, match[1])
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        left = values(argv)
    except flags.IllegalFlagValueError as error:
        raise UserError(_wrong_type(config, str(error))) from None
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    if len(left) > 1:
        raise UserError(f"unexpected argument {left[1]!r}; an override is --config.FIELD=VALUE")
    return config


def _check_field(config: ConfigDict, path: str) -> None:
    """Raises a `UserError` unless `path` names a single field of the config."""
    parent: Any = config
    for depth, name in enumerate(path.split(".")):
        if not isinstance(parent, ConfigDict) or name not in parent:
            group = ".".join(["config", *path.split(".")[:depth]])
            raise UserError(
                f"--config.{path}: there is no such field; {_nearest(config, path, group, parent)}"
            )
        parent = parent[name]
    if isinstance(parent, ConfigDict) and len(parent):
        fields = ", ".join(sorted(parent))
        raise UserError(f"--config.{path} is a group of fields; set one of them: {fields}")


def _nearest(config: ConfigDict, path: str, group: str, parent: Any) -> str:
    fields = leaf_fields(config)
    same_end = [field for field in fields if field.rpartition(".")[2] == path.rpartition(".")[2]]
    ends = {field.rpartition(".")[2]: field for field in fields}
    near_end = difflib.get_close_matches(path.rpartition(".")[2], ends, n=1, cutoff=0.75)
    near = difflib.get_close_matches(path, fields, n=1, cutoff=0.75)
    best = near[:1] or same_end[:2] or [ends[end] for end in near_end]
    if best:
        return "did you mean " + " or ".join(f"--config.{field}" for field in best) + "?"
    if not isinstance(parent, ConfigDict):
        return f"{group} is a value of type {type(parent).__name__}, not a group of fields"
    return f"{group} has {', '.join(sorted(parent))}"


def leaf_fields(config: ConfigDict, prefix: str = "") -> list[str]:
    """The dotted paths of all fields; a group without fields counts as one."""
    paths = []
    for name, value in config.items():
        if isinstance(value, ConfigDict) and len(value):
            paths += leaf_fields(value, f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def _wrong_type(config: ConfigDict, message: str) -> str:
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if not match:
        return message
    default: Any = config
    for name in match[1].split("."):
        default = default[name]
    kind = {"bool": "true or false", "ConfigDict": "a dict such as {'name': 1}"}.get(
        type(default).__name__, f"of type {type(default).__name__}, such as {default!r}"
    )
    return f"--config.{match[1]} is {match[2]!r}; it must be {kind}"
