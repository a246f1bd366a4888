import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import step_grpo
from step_grpo import cli
from step_grpo.errors import UserError

ENTRY = '''"""A tiny program."""
import sys
from pathlib import Path
from ml_collections import ConfigDict
from step_grpo import cli
from step_grpo.errors import UserError


def main(config: ConfigDict, workdir: Path = Path("runs"), checkpoint: str = "") -> None:
    if config.action == "user error":
        raise UserError("config.action: first line\\nsecond line")
    if config.action == "bug":
        raise ValueError("a real bug")
    if config.action == "interrupt":
        raise KeyboardInterrupt
    print(config.steps, config.rate, config.group.words, config.group.strict, config.open.to_dict())
    print(repr(workdir), repr(checkpoint), config.is_locked, "jax" in sys.modules)


if __name__ == "__main__":
    cli.run(main)
'''

THREADS = '''"""Eight threads at once hold memory; how many heaps there are then."""
import ctypes, threading
import step_grpo.main
from step_grpo import cli


def main() -> None:
    libc, together = ctypes.CDLL(None), threading.Barrier(8)
    libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p

    def hold():
        libc.malloc(100_000)
        together.wait()

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    file = ctypes.c_void_p(libc.fopen(b"heaps.xml", b"w"))
    libc.malloc_info(0, file)
    libc.fclose(file)


if __name__ == "__main__":
    cli.run(main)
'''

CONFIG = """from ml_collections import ConfigDict
from step_grpo.errors import UserError


def get_config(arg=""):
    if arg == "refused":
        raise UserError("--config: unknown argument 'refused'")
    if arg == "raises":
        return 1 / 0
    if arg == "other":
        return {}
    group = {"words": ("Wait",), "strict": True, "learning_rate": 1e-6}
    return ConfigDict({"steps": 3, "rate": 0.5, "action": arg, "group": group, "open": {}})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("program")
    (folder / "entry.py").write_text(ENTRY)
    (folder / "threads.py").write_text(THREADS)
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "syntax.py").write_text("def get_config():\n    return (\n")
    (folder / "imports.py").write_text("\nimport no_such_package\n")
    (folder / "empty.py").write_text("")
    (folder / "noarg.py").write_text(CONFIG.replace('arg=""', ""))
    (folder / "notes.txt").write_text("a file")
    return folder


def run(folder: Path, *arguments: str, program: str = "entry.py") -> subprocess.CompletedProcess:
    paths = [str(Path(step_grpo.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, program, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_overrides_of_every_type_reach_main_in_a_locked_config_without_jax(folder):
    done = run(
        folder,
        *("--config=tiny.py", "--config.steps=7", "--config.rate", "1", "--noconfig.group.strict"),
        *("--config.group.words=('Wait', 'But')", "--config.open={'a': 1}", "--workdir=out/x"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "7 1.0 ('Wait', 'But') False {'a': 1}\nPosixPath('out/x') '' True False\n"
    assert done.stderr == ""


def test_flags_left_out_take_the_defaults_of_main(folder):
    done = run(folder, "--checkpoint", "here", "--config", "tiny.py")
    assert done.stdout == "3 0.5 ('Wait',) True {}\nPosixPath('runs') 'here' True False\n"


def test_config_that_is_not_here_is_taken_from_the_installation(folder, tmp_path, monkeypatch):
    (tmp_path / "installed" / "configs").mkdir(parents=True)
    (tmp_path / "installed" / "configs" / "tiny.py").write_text(CONFIG)
    monkeypatch.setattr(cli, "SHIPPED", tmp_path / "installed")
    monkeypatch.chdir(tmp_path)
    assert cli.load_config("configs/tiny.py:arg").action == "arg"
    for missing in ("configs/tini.py", "other/tiny.py", "configs/../configs/none.py"):
        with pytest.raises(UserError, match="no such file"):
            cli.load_config(missing)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(CONFIG.replace('"steps": 3', '"steps": 4'))
    assert cli.load_config("configs/tiny.py").steps == 4  # the file that is here comes first


MISTAKES = {
    "no config": ((), "--config is missing"),
    "config given as an argument": (("tiny.py",), "did you mean --config=tiny.py?"),
    "missing config file": (("--config=tinny.py",), "no such file: tinny.py (did you mean tiny.py?)"),
    "config a folder": (("--config=.",), "no such file: ."),
    "config not python": (("--config=notes.txt",), "notes.txt is not a Python file"),
    "config without value": (("--config",), "Missing value for flag --config"),
    "syntax error": (
        ("--config=syntax.py",),
        "syntax.py: SyntaxError: '(' was never closed (syntax.py, line 2)",
    ),
    "failing import": (("--config=imports.py",), "imports.py, line 2: ModuleNotFoundError"),
    "config raises": (("--config=tiny.py:raises",), "tiny.py, line 9: ZeroDivisionError"),
    "config refuses": (("--config=tiny.py:refused",), "unknown argument 'refused'"),
    "no get_config": (("--config=empty.py",), "empty.py: AttributeError"),
    "takes no argument": (
        ("--config=noarg.py:x",),
        "noarg.py takes no argument; leave out the colon and 'x'",
    ),
    "not a config": (("--config=tiny.py:other",), "returns dict, not a ConfigDict"),
    "typo in a field": (
        ("--config=tiny.py", "--config.group.lerning_rate=1"),
        "--config.group.lerning_rate: there is no such field; did you mean --config.group.learning_rate?",
    ),
    "field in another group": (
        ("--config=tiny.py", "--config.learning_rate=1"),
        "did you mean --config.group.learning_rate?",
    ),
    "nothing near": (("--config=tiny.py", "--config.group.xyz=1"), "has learning_rate, strict, words"),
    "inside a value": (("--config=tiny.py", "--config.steps.qq=1"), "did you mean --config.steps?"),
    "deep inside a value": (
        ("--config=tiny.py", "--config.rate.a.zz=1"),
        "config.rate is a value of type float",
    ),
    "a whole group": (("--config=tiny.py", "--config.group=1"), "is a group of fields"),
    "dict of nothing": (("--config=tiny.py", "--config.open=1"), "must be a dict"),
    "int": (("--config=tiny.py", "--config.steps=2.5"), "--config.steps is '2.5'; it must be of type int"),
    "float": (("--config=tiny.py", "--config.rate=much"), "it must be of type float, such as 0.5"),
    "bool": (("--config=tiny.py", "--config.group.strict=7"), "it must be true or false"),
    "negated int": (("--config=tiny.py", "--noconfig.steps"), "config.steps"),
    "field without value": (("--config=tiny.py", "--config.steps"), "Missing value for flag --config.steps"),
    "unknown flag": (("--config=tiny.py", "--wrkdir=x"), "unknown flag --wrkdir; did you mean --workdir?"),
    "far flag": (("--config=tiny.py", "--zzz"), "there are --config, --workdir, --checkpoint"),
    "one dash": (("--config=tiny.py", "-z=1"), "'z'"),
    "stray argument": (("--config=tiny.py", "stray"), "unexpected argument 'stray'"),
    "workdir a file": (("--config=tiny.py", "--workdir=notes.txt"), "is not a folder"),
    "workdir in a file": (("--config=tiny.py", "--workdir=notes.txt/a/b"), "is not a folder"),
    "error inside main": (("--config=tiny.py:user error",), "config.action: first line second line"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_every_mistake_is_one_line_and_exit_code_2(folder, case):
    arguments, part = MISTAKES[case]
    done = run(folder, *arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("step_grpo: error: ")
    assert part in done.stderr
    assert done.stdout == ""


DATA_ENTRY = """from ml_collections import ConfigDict
from step_grpo import cli
from step_grpo.config import validate
from step_grpo.data.prompts import load_tokenizer
from step_grpo.data.sources import load_questions


def main(config: ConfigDict) -> None:
    validate(config)
    load_questions(config.data)
    load_tokenizer(config.model.tokenizer)


cli.run(main)
"""

DATA_MISTAKES = {
    "value out of range": (("--config.rollout.delta=2",), "config.rollout.delta is 2.0"),
    "hub out of reach": (
        ("--config.data.source=hf", "--config.data.name=no/such"),
        "config.data.name: 'no/such'",
    ),
    "broken file": (("--config.data.source=hf", "--config.data.name=bad.jsonl"), "cannot load 'bad.jsonl'"),
    "tfds name": (
        ("--config.data.source=tfds", "--config.data.name=math_qaa"),
        "config.data.name: TFDS has no",
    ),
    "missing file": (
        ("--config.data.name=none.jsonl",),
        "config.data.name: no such file or folder: none.jsonl",
    ),
    "row without answer": (("--config.data.name=rows.jsonl",), "rows.jsonl, line 2: no column 'answer'"),
    "tokenizer out of reach": (("--config.model.tokenizer=no/such",), "config.model.tokenizer: 'no/such'"),
}


@pytest.mark.parametrize("case", DATA_MISTAKES)
def test_mistakes_about_data_and_tokenizer_are_one_line_too(folder, case, monkeypatch):
    (folder / "data_entry.py").write_text(DATA_ENTRY)
    (folder / "base.py").write_text("from step_grpo.config import base_config as get_config\n")
    (folder / "good.jsonl").write_text('{"problem": "Q", "answer": "1"}\n')
    (folder / "bad.jsonl").write_text("{not json\n")
    (folder / "rows.jsonl").write_text('{"problem": "Q", "answer": "1"}\n{"problem": "Q"}\n')
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):  # asked for, it would be a setting
        monkeypatch.delenv(name, raising=False)
    arguments, part = DATA_MISTAKES[case]
    columns = ("--config.data.prompt_column=problem", "--config.data.answer_column=answer")
    local = ("--config.data.source=jsonl", "--config.data.name=good.jsonl", *columns)
    done = run(folder, "--config=base.py", *local, *arguments, program="data_entry.py")
    assert done.returncode == (75 if "out of reach" in case else 2), done.stderr
    assert done.stderr.count("\n") == 1 and part in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError("no such bucket"), 2),
        (PermissionError("not yours"), 2),
        (type("HttpError", (Exception,), {"code": 403})("Forbidden"), 2),
        (type("HttpError", (Exception,), {"code": 503})("Service Unavailable"), 75),
        (ConnectionError("no route to host"), 75),
    ],
)
def test_bucket_that_refuses_is_a_mistake_and_one_that_is_silent_is_not(error, code, monkeypatch, capsys):
    class Bucket:
        def __truediv__(self, name):
            return self

        def write_text(self, text):
            raise error

    monkeypatch.setattr(cli.paths, "folder", lambda name: Bucket())

    def main(workdir: Path) -> None:
        pytest.fail("the workdir cannot be written")

    with pytest.raises(SystemExit) as ended:
        cli.run(main, ["program", "--workdir=gs://bucket/run"])
    assert ended.value.code == code
    told = f"--workdir=gs://bucket/run: cannot be written ({error})"
    assert capsys.readouterr().err == f"step_grpo: error: {told}\n"


def test_a_bug_keeps_its_traceback_and_exits_1(folder):
    done = run(folder, "--config=tiny.py:bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ValueError: a real bug" in done.stderr


def test_interrupt_is_one_line_and_exit_code_130(folder):
    done = run(folder, "--config=tiny.py:interrupt")
    assert (done.returncode, done.stderr) == (130, "step_grpo: stopped by Ctrl-C\n")


def test_help_shows_the_docstring_and_every_flag(folder):
    done = run(folder, "--help")
    assert done.returncode == 0
    for part in ("A tiny program.", "--config=", "required", "--workdir=", "default: runs", "--checkpoint="):
        assert part in done.stdout


def test_program_without_a_config_takes_flags_alone():
    def main(checkpoint: str, out: Path) -> None:
        """Takes no config."""

    assert cli.parse(main, ["program", "--checkpoint=c", "--out=o"]) == {"checkpoint": "c", "out": Path("o")}
    with pytest.raises(UserError, match="--out is missing"):
        cli.parse(main, ["program", "--checkpoint=c"])
    with pytest.raises(UserError, match=r"unknown flag --config\.steps"):
        cli.parse(main, ["program", "--checkpoint=c", "--out=o", "--config.steps=1"])


def test_switch_takes_no_value_and_overrides_are_not_lost_without_a_config():
    def main(checkpoint: str, config: ConfigDict | None = None, truncated: bool = False) -> None:
        """The config may be left out."""

    assert cli.parse(main, ["p", "--truncated", "--checkpoint=c"]) == {"checkpoint": "c", "truncated": True}
    assert cli.parse(main, ["p", "--checkpoint=c"]) == {"checkpoint": "c"}
    with pytest.raises(UserError, match=r"--config\.steps=1 needs --config too"):
        cli.parse(main, ["p", "--checkpoint=c", "--config.steps=1"])
    assert "--truncated (default: False)" in cli.usage(main)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives threads heaps of their own")
def test_threads_share_a_heap_unless_the_environment_says_otherwise(folder, monkeypatch):
    heaps = {}
    for most in ("", "8"):
        monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
        if most:
            monkeypatch.setenv("MALLOC_ARENA_MAX", most)
        assert run(folder, program="threads.py").returncode == 0
        heaps[most] = (folder / "heaps.xml").read_text().count("<heap nr=")
    assert heaps[""] <= 2 < heaps["8"]  # an import may have started a thread
