"""The documentation against the program: commands, flags, fields, functions, messages, links and examples."""

import ast
import contextlib
import doctest
import html
import importlib.util
import inspect
import io
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jax
import pytest
from gate import is_run, lines
from ml_collections import ConfigDict
from pages import PAGES, ROOT, Piece, anchors, blocks, commands, links, spans
from short_run import ONE_STEP, read_records, short_config, train

import step_grpo
from step_grpo import cli
from step_grpo.config import base_config, sft_config, validate, validate_sft
from step_grpo.errors import UserError
from step_grpo.fit.chips import chip_count, chip_of
from step_grpo.fit.programs import Run, chosen_lanes
from step_grpo.main import main as training
from step_grpo.rollout import policies
from step_grpo.study_config import study_config, validate_study

OTHERS = {  # programs that are not of this project, and what is known of their lines
    **dict.fromkeys(("cd", "export", "source"), "the shell's"),
    **dict.fromkeys(("ruff", "mypy", "shellcheck", "mkdocs"), "run by the gate"),
    **dict.fromkeys(("gcloud", "gcluster"), "stood in for, in test_tpu_scripts.py"),
    "git": "the gate makes its clone with it",
    "docker": "not run: the gate's machine need not have it; test_tpu_scripts.py reads the Dockerfile",
    "sky": "not run: needs an account; test_tpu_scripts.py reads its file",
    "pre-commit": "not run: its hooks are the gate's linters, which a test below compares",
    "lm_eval": "not run: needs a package and its tasks from the network; the page says what was tried",
    "vllm": "not run: needs a GPU; the page says so",
    "ssh-add": "not run: needs an agent",
}
VALIDATORS = {"sft": validate_sft, "study": validate_study}
FLAG = re.compile(r"--([\w-]+)")


def of_pages(what, *arguments) -> list:
    found = [piece for page in PAGES for piece in what(page, *arguments)]
    return [pytest.param(piece, id=piece.place) for piece in found]


# ---------------------------------------------------------------------- commands


def check_command(words: list[str]) -> None:
    """Fails where a command names a program, file, flag or field that does not exist."""
    program, *rest = words
    if program in ("python", "python3") and rest[0] == "-m" and rest[1].partition(".")[0] == "step_grpo":
        check_entry_point(rest[1], rest[2:])
    elif program in ("python", "python3") and rest[0] == "-m" and rest[1].startswith("benchmarks."):
        source = (ROOT / f"{rest[1].replace('.', '/')}.py").read_text(encoding="utf-8")
        assert all(f'"--{flag}"' in source for word in rest[2:] for flag in FLAG.findall(word)[:1])
    elif program in ("python", "python3") and rest[0] == "-c":
        compile(rest[1], program, "exec")
    elif program in ("python", "python3"):
        assert rest[:2] == ["-m", "venv"] or (ROOT / rest[0]).is_file()
    elif program == "pip":
        asked = {extra for word in rest for extra in re.findall(r"^(?:\.|step_grpo)\[(.*)\]$", word)}
        assert {extra for names in asked for extra in names.split(",")} <= extras()
    elif program == "pytest":
        assert all((ROOT / word.partition("::")[0]).exists() for word in rest if not word.startswith("-"))
    elif "/" in program:
        script = ROOT / program
        assert script.is_file()
        known = script.read_text(encoding="utf-8") + (ROOT / "tpu" / "common.sh").read_text(encoding="utf-8")
        assert all(
            f"--{flag}" in known for word in rest for flag in FLAG.findall(word)[:1] if flag != "config"
        )
    else:
        assert program in OTHERS, f"unknown program {program!r}"


def check_entry_point(name: str, arguments: list[str]) -> None:
    """Reads the command line of a program as the program itself does, and runs nothing."""
    module = importlib.import_module(
        name if (ROOT / f"{name.replace('.', '/')}.py").is_file() else f"{name}.__main__"
    )
    parsed = cli.parse(module.main, [name, *arguments])
    if isinstance(config := parsed.get("config"), ConfigDict):
        VALIDATORS.get(name.rpartition(".")[2], validate)(config)


@cache
def extras() -> set[str]:
    """The extras of setup.py."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    return set(re.findall(r'^ {8}"(\w+)": \[', text, re.MULTILINE))


@pytest.fixture
def desk(piece, tmp_path, monkeypatch) -> Path:
    """A folder with `configs` and the files that the page of a piece tells its reader to write."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for block in blocks(piece.page, "python"):
        if name := re.match(r"# (\w+\.py)\n", block.text):
            (tmp_path / name[1]).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cli, "_folder_in_bucket", lambda name, value: Path(value))  # it would write there
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_is_so_that_none_goes_unread(page):
    assert {block.kind for block in blocks(page)} <= {"bash", "python", "text"}


@pytest.mark.parametrize("piece", of_pages(blocks, "bash"))
def test_commands_name_programs_files_flags_and_fields_that_exist(piece, desk):
    for words in commands(piece.text):
        check_command(words)


def in_running_text(page: Path) -> list[Piece]:
    return [span for span in spans(page) if re.match(r"(python -m|pytest|pip install) ", span.text)]


@pytest.mark.parametrize("piece", of_pages(in_running_text))
def test_commands_in_running_text_exist_too(piece, desk):
    for words in commands(piece.text):
        with contextlib.suppress(UserError) if is_outline(words) else contextlib.nullcontext():
            check_command(words)


def is_outline(words: list[str]) -> bool:
    """Whether a command leaves out what must be given, as in `python -m step_grpo.fit --config=...`."""
    return len(words) == 3 or any("..." in word for word in words)


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("python -m step_grpo.main --config=configs/tiny.py --config.rollot.delta=1", "no such field"),
        ("python -m step_grpo.main --config=configs/tini.py", "no such file"),
        ("python -m step_grpo.main --config=configs/tiny.py --wrkdir=x", "unknown flag"),
        ("python -m step_grpo.main --config=configs/tiny.py --config.rollout.delta=2", "rollout.delta is 2"),
        ("python -m step_grpo.study --config=configs/tiny.py", "order"),
        ("python -m benchmarks.probe --no_such_flag", None),
        ("pip install -e '.[no_such_extra]'", None),
        ("pytest tests/no_such_file.py", None),
        ("tpu/create.sh --no-such-flag=1", None),
        ("no_such_program", "unknown program"),
    ],
)
def test_a_mistyped_command_is_found(command, wrong, monkeypatch):
    monkeypatch.chdir(ROOT)
    (words,) = commands(command)
    with pytest.raises((UserError, AssertionError, AttributeError), match=wrong):
        check_command(words)


TESTED = {
    "python -m step_grpo.replay": "test_guards.py::test_run_skips_counts_keeps_and_replays_a_poisoned_batch",
    "python -m step_grpo.fit.table": "test_fit.py::"
    "test_table_takes_the_smallest_slice_that_fits_and_compiles_nothing_twice",
}
"""Programs that the gate does not start, since it has no damaged batch and not the hours; what tests them."""


@pytest.mark.parametrize("piece", of_pages(blocks, "bash"))
def test_programs_of_the_pages_are_run_by_the_gate(piece):
    """By one line of it, with the same flags, the same values of them, and the same config."""
    for line in lines(piece.text):
        if line.program.startswith("python -m step_grpo.") and line.program not in TESTED:
            assert is_run(line), line


@pytest.mark.parametrize("program", TESTED)
def test_what_the_gate_leaves_out_has_a_test(program):
    file, _, name = TESTED[program].partition("::")
    assert name in definitions(ROOT / "tests" / file)
    package, _, module = program.removeprefix("python -m ").rpartition(".")
    text = (ROOT / "tests" / file).read_text(encoding="utf-8")
    assert re.search(rf"from {package} import .*\b{module}\b", text)


# ---------------------------------------------------------------------- slices

SLICES = {"v6e-8": "v6e:2x4", "v5e-1": "v5e:1x1"}  # as they are asked for -> as they are compiled for
ASKS = re.compile(r"--(?:accelerator|compute-type|topology)=([\w:-]+)$")


def of_slices() -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Where a line that trains on a slice stands -> the slice, the config, and the fields it sets.

    A line that names no slice is for the one that was asked for last on its page.
    """
    found = {}
    for page in PAGES:
        asked = ""
        for block in blocks(page, "bash"):
            for number, words in enumerate(commands(block.text)):
                if words[0] == "sky":
                    words = in_full(words)  # noqa: PLW2901
                named = [m[1] for word in words if (m := ASKS.match(word))]
                asked = next((name for name in named if "-" in name or ":" in name), asked)
                configs = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
                on_slice = named or words[0].startswith("tpu/")
                if configs and on_slice:
                    fields = tuple(word for word in words if word.startswith("--config."))
                    found[f"{block.place}+{number}"] = SLICES.get(asked, asked), configs[0], fields
    return found


def in_full(words: list[str]) -> list[str]:
    """The line that SkyPilot runs, on the slice that its file names."""
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((ROOT / "tpu" / "skypilot.yaml").read_text(encoding="utf-8"))
    given = dict(word.split("=", 1) for word in words if re.match(r"[A-Z]+=", word))
    kind = task["resources"]["accelerators"].removeprefix("tpu-")
    return [f"--accelerator={kind}", f"--config={given['CONFIG']}", *shlex.split(given.get("ARGS", ""))]


@cache
def lanes_on(topology: str, config: str, fields: tuple[str, ...]) -> int:
    """Lanes of a run over a whole slice, counted over as many devices of this machine."""
    chips = chip_count(topology) * chip_of(topology).devices
    parsed = cli.parse(training, ["main", f"--config={ROOT / config}", *fields])["config"]
    sizes = Run(parsed, jax.devices()[:chips], 0, 0).sizes()
    return chosen_lanes(sizes, topology) * sizes.groups


@pytest.mark.parametrize("place", of_slices())
def test_line_for_a_slice_leaves_room_for_lanes(place):
    assert lanes_on(*of_slices()[place]) > 0


def test_lines_for_slices_are_found_and_one_without_its_fields_has_no_room():
    found = set(of_slices().values())
    spread = ("--config.mesh.tensor=4", "--config.grpo.moments_dtype=bfloat16")
    assert ("v6e:2x4", "configs/qwen3_8b.py", spread) in found and len(of_slices()) >= 7
    assert lanes_on("v6e:2x4", "configs/qwen3_8b.py", ()) == 0


# ---------------------------------------------------------------------- fields, names, messages


@cache
def fields() -> set[str]:
    """Dotted paths of all fields and groups of the three kinds of config."""

    def paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
        for name, value in config.items():
            yield prefix + name
            if isinstance(value, ConfigDict):
                yield from paths(value, f"{prefix}{name}.")

    return {path for config in (base_config(), sft_config(), study_config({})) for path in paths(config)}


def names_field(page: Path) -> list[Piece]:
    """Inline code such as `config.rollout.delta`, `--config.seed=1` and `rollout.exit=none`."""
    groups = "|".join(name for name, value in base_config().items() if isinstance(value, ConfigDict))
    field = r"([a-z_]\w*(?:\.\w+)*)"
    no_file = r"(?!(?:\w+\.)*(?:py|json|safetensors)$)"
    pattern = re.compile(rf"(?:(?:--)?config\.|(?=(?:{groups})\.)){no_file}{field}(?:=.*)?$", re.DOTALL)
    named = [(span, pattern.match(span.text)) for span in spans(page)]
    return [Piece(span.page, span.line, match[1]) for span, match in named if match]


def names_code(text: str) -> bool:
    """Whether this is `module.function`, as in `mesh.use_all_cores`, or `package.module.function`."""
    module, _, name = text.partition(".")
    if (file := ROOT / "step_grpo" / f"{module}.py").is_file():
        return name in definitions(file)
    file = ROOT / "step_grpo" / module / f"{name.partition('.')[0]}.py"
    return file.is_file() and name.partition(".")[2] in {"", *definitions(file)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_field_that_the_text_names_exists(page):
    unknown = [p for p in names_field(page) if p.text not in fields() and not names_code(p.text)]
    assert not {(piece.place, piece.text) for piece in unknown}


@cache
def definitions(file: Path) -> dict[str, ast.AST]:
    """Functions and classes of a file by name, methods with their class in front."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
            inside = node.body if isinstance(node, ast.ClassDef) else []
            found |= {f"{node.name}.{n.name}": n for n in inside if isinstance(n, ast.FunctionDef)}
    return found


def of_functions(page: Path) -> list[Piece]:
    """Links from a name in code to a Python file."""
    return [link for link in links(page) if link.kind.endswith(".py") and re.match(r"`[\w.]+`$", link.text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_function_that_the_text_links_is_in_the_file(page):
    for link in of_functions(page):
        file = (page.parent / link.kind).resolve()
        name = link.text.strip("`")
        if name != file.name:
            assert name.removeprefix(f"{file.stem}.") in definitions(file), link.place


def test_every_equation_of_the_method_has_a_function():
    page = ROOT / "docs" / "method.md"
    sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    linked = {link.kind for link in of_functions(page)}
    for section in sections:
        shown, named = section.count("$$") // 2, len(re.findall(r"^\*Computed by:?\*", section, re.MULTILINE))
        assert shown == named, section.partition("\n")[0]
    assert len(linked) >= 8


def test_functions_that_the_tables_of_methods_name_name_the_paper():
    """A function by its docstring, a program by that of its module."""
    tables = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    files = {
        "rewards": "reward/rewards",
        "advantages": "grpo/advantages",
        "loss": "grpo/loss",
        "main": "main",
    }
    checked = 0
    for row in tables.splitlines():
        paper = re.search(r"arxiv\.org/abs/([\d.]+)\) \|", row)
        named = re.findall(r"`(rewards|advantages|loss|main)\.(\w+)`", row)
        nodes = [definitions(ROOT / "step_grpo" / f"{files[module]}.py")[name] for module, name in named]
        nodes += [
            ast.parse((ROOT / path).read_text(encoding="utf-8"))
            for path in re.findall(r"\(\.\./(step_grpo\S+)\)", row)
        ]
        for node in nodes if paper else []:
            assert paper[1] in ast.get_docstring(node), row
            checked += 1
    assert checked >= 15


@cache
def texts_of_the_program() -> str:
    """Every string of the package, with `…` where a value is filled in."""
    found = []
    for file in sorted((ROOT / "step_grpo").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
    return "\n".join(found)


def messages() -> list[str]:
    text = (
        (ROOT / "docs" / "troubleshooting.md")
        .read_text(encoding="utf-8")
        .partition("## Messages of others")[0]
    )
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


@pytest.mark.parametrize("message", messages())
def test_message_is_one_that_the_program_prints(message):
    assert message in texts_of_the_program()


def test_troubleshooting_has_messages():
    assert len(messages()) >= 25
    assert "no such message" not in texts_of_the_program()


# ---------------------------------------------------------------------- the policy of own.md


def test_policy_of_the_page_decides_in_a_rollout(tmp_path, monkeypatch):
    """Its builder stands in for that of `confidence`; a completion exits where its least token is sure."""
    (code,) = [b for b in blocks(ROOT / "docs" / "own.md", "python") if b.text.startswith("# my_policy.py")]
    module: dict[str, object] = {"__name__": "my_policy"}
    exec(compile(code.text, code.place, "exec"), module)
    built = []

    def builder(*arguments):
        built.append(module["weakest_policy"](*arguments))
        return built[-1]

    monkeypatch.setitem(policies.POLICIES, "confidence", builder)
    done = train(short_config(ONE_STEP, {"rollout": {"delta": 0.6}}), tmp_path)
    assert {type(own.policy) for own in built} == {module["Weakest"]}
    rows = read_records(done.workdir / "rollouts.jsonl")
    asked = [(row["reason"] == "early_exit", row["confidences"]) for row in rows if row["confidences"]]
    assert asked
    for left, confidences in asked:
        assert (confidences[-1] > 0.6) == left and max(confidences[:-1], default=0.0) <= 0.6


# ---------------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    broken = []
    for link in links(page):
        name, _, anchor = link.kind.partition("#")
        target = (page.parent / name).resolve() if name else page
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and (target.suffix != ".md" or anchor not in anchors(target))):
            broken.append(f"{link.place}: {link.kind}")
    assert not broken


def test_every_page_is_in_the_navigation_and_nothing_else():
    yaml = pytest.importorskip("yaml")
    text = re.sub(r"!!python\S+", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [
            leaf for value in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(value)
        ]

    assert sorted(leaves(yaml.safe_load(text)["nav"])) == sorted(
        page.name for page in (ROOT / "docs").glob("*.md")
    )


# ---------------------------------------------------------------------- habits


def of_gate() -> list[str]:
    return (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()


LINTERS = ("ruff check .", "ruff format --check .", "mypy", "shellcheck")


def read_yaml(name: str):
    yaml = pytest.importorskip("yaml")
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_workflow_does_what_the_gate_does():
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    runs = [step["run"] for step in jobs["lint"]["steps"] if "run" in step]
    assert all(line in of_gate() for line in runs if "pip" not in line) and len(runs) == len(LINTERS) + 1
    gate = jobs["gate"]
    assert gate["steps"][-1] == {"run": ".ci/run"} and "STEP_GRPO_TEST_DATA" in gate["env"]
    for name in re.findall(r"python\"? (\S+\.py)", str(gate)):
        assert (ROOT / name).is_file()


def test_hooks_before_a_commit_are_the_linters_of_the_gate():
    hooks = [hook for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert tuple(hook["entry"] for hook in hooks) == LINTERS
    assert all(any(line.startswith(entry) for line in of_gate()) for entry in LINTERS)


def test_forms_for_issues_ask_for_something():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = read_yaml(str(path))
        if path.name != "config.yml":
            assert form["name"] and form["description"] and form["body"]
            assert all(part["attributes"]["label"] and part["id"] for part in form["body"])


def test_citation_and_changelog_have_the_version_of_the_package():
    citation = read_yaml("CITATION.cff")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (
        citation["version"] == step_grpo.__version__ == re.findall(r"^## ([\d.]+)", changes, re.MULTILINE)[0]
    )
    assert citation["license"] == "Apache-2.0"


# ---------------------------------------------------------------------- the table of fields


@pytest.fixture(scope="module")
def table() -> str:
    spec = importlib.util.spec_from_file_location("fields", ROOT / "docs" / "fields.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.table_of_fields()


def test_table_has_every_field_once_with_its_default(table):
    groups = re.split(r"^### `config\.?(.*)`$", table, flags=re.MULTILINE)[1:]
    rows = {}
    for group, text in zip(groups[::2], groups[1::2], strict=True):
        for name, shown in re.findall(r"^\| `(\w+)` \| <code>(.*?)</code> \|", text, re.MULTILINE):
            path = f"{group}.{name}".lstrip(".")
            assert path not in rows
            rows[path] = html.unescape(shown)
    assert sorted(rows) == sorted(cli.leaf_fields(base_config()))
    for path, shown in rows.items():
        value = base_config()
        for name in path.split("."):
            value = value[name]
        assert ast.literal_eval(shown) == (value.to_dict() if isinstance(value, ConfigDict) else value)


def test_table_has_every_comment_of_the_fields(table):
    source = inspect.getsource(base_config)
    body = source[: source.index("    groups = {")]
    body = re.sub(r"^    (?:#.*\n    )*#.*\n    data = data_config\(", "", body, flags=re.MULTILINE)
    for comment in re.findall(r"# (.*)$", body, re.MULTILINE):
        assert comment.replace("|", "\\|") in table, comment


# ---------------------------------------------------------------------- examples


def of_python(page: Path) -> list[Piece]:
    return blocks(page, "python")[:1]


@pytest.mark.parametrize("piece", of_pages(of_python))
def test_python_of_a_page_runs_and_prints_what_it_shows(piece, desk):
    """All of it, from top to bottom, in one namespace; blocks with `>>>` are compared with their output."""
    shared: dict[str, object] = {"__name__": "page"}
    for block in blocks(piece.page, "python"):
        if ">>>" in block.text:
            example = doctest.DocTestParser().get_doctest(block.text, shared, block.place, None, block.line)
            report = io.StringIO()
            failed, _ = doctest.DocTestRunner().run(example, out=report.write, clear_globs=False)
            shared |= example.globs
            assert not failed, report.getvalue()
        else:
            exec(compile(block.text, block.place, "exec"), shared)


def with_examples() -> list[str]:
    files = sorted((ROOT / "step_grpo").rglob("*.py"))
    chosen = [file for file in files if ">>> " in file.read_text(encoding="utf-8")]
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in chosen]


@pytest.mark.parametrize("name", with_examples())
def test_examples_of_docstrings_give_what_they_show(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
