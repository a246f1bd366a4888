"""Several processes of one run, over the loopback: the same as one process, in every figure."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from quick_xla import devices_flag
from safetensors.numpy import load_file
from short_run import ROOT, ShortRun, read_records, short_config, train
from test_mesh import CFG, gradient

from step_grpo import checkpoint, distributed
from step_grpo.errors import UserError

STEPS = int(os.environ.get("STEP_GRPO_TEST_STEPS", "2"))  # of the runs that are compared
SMALL = {
    "steps": STEPS,
    "save_every": STEPS,
    "rollout": {"max_response_tokens": 64},
    "grpo": {"row_length": 96},
    "eval": {"questions": 8, "max_response_tokens": 64},
    "log": {"rollouts": 1000},  # all completions
}
WHOLE = {
    **SMALL,
    "save_every": 1,
    "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    "grpo": {"row_length": 96, "rows": 4},
}
PROMPTLY = 60  # seconds within which a process ends whose peer was killed; alone on a machine it is a tenth
HEARTBEAT = {f"{distributed.HEARTBEAT}_{process}": "10" for process in range(2)}
ROUNDING = {"rel": 1e-4, "abs": 1e-5}


def processes(*arguments: str, **environment: str) -> list[tuple[int, str]]:
    """Exit code and output of two processes of four devices each; `X_0` and `X_1` differ between them.

    What they say on stderr follows what they say on stdout: Gloo writes to stdout from threads of its own, in
    one pipe it would end up in the middle of a line.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = []
    for process in range(2):
        own = {k.removesuffix(f"_{process}"): v for k, v in environment.items() if k.endswith(f"_{process}")}
        running.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "process_worker.py"), *arguments],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                    "XLA_FLAGS": devices_flag(4),
                    distributed.COORDINATOR: f"127.0.0.1:{port}",
                    distributed.PROCESSES: "2",
                    distributed.PROCESS: str(process),
                    **own,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        with ThreadPoolExecutor(len(running)) as pool:
            ended = list(pool.map(_ended, running))
    finally:
        for p in running:
            p.kill()
    times = [at for *_, at in ended]
    assert max(times) - min(times) < PROMPTLY, ended
    return [(code, printed) for code, printed, _ in ended]


def _ended(process: subprocess.Popen) -> tuple[int, str, float]:
    printed = "".join(process.communicate(timeout=400))
    return process.returncode, printed, time.monotonic()


def assert_left_alone(ended: tuple[int, str]) -> None:
    """It says in one line that another process is gone; or JAX, in its own words, ended it first."""
    code, printed = ended
    assert code in (1, -signal.SIGABRT), printed
    if code == 1:
        assert printed.count("step_grpo: error: another process of the run is gone (") == 1, printed
        assert "start all of them again: they go on from the newest checkpoint" in printed
    else:
        assert "This most likely indicates that another task died" in printed


def test_gradient_over_two_processes_is_that_of_one_device(tmp_path):
    ended = processes("gradient", str(tmp_path / "sums.npz"))
    assert [code for code, _ in ended] == [0, 0], ended
    with np.load(tmp_path / "sums.npz") as held:
        found = [held[name] for name in held.files]
    expected = jax.tree.leaves(gradient(CFG, (1, 1, 1), rows=8))
    for value, there in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, there, rtol=1e-5, atol=1e-5 * np.abs(there).max())


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> ShortRun:
    """The same steps in one process, on other devices."""
    return train(short_config(SMALL, {"mesh": {"data": 1}}), tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[ShortRun, list[str]]:
    """The run over two processes, and what each of them printed, after one was killed in the second step."""
    workdir = tmp_path_factory.mktemp("together")
    killed = processes("train", str(workdir), json.dumps(WHOLE), KILL_1="2", **HEARTBEAT)
    assert killed[1][0] == -signal.SIGKILL, killed
    assert_left_alone(killed[0])
    assert [path.name for path in checkpoint.saved_steps(workdir)] == ["000001"]
    ended = processes("train", str(workdir), json.dumps(WHOLE))
    assert [code for code, _ in ended] == [0, 0], ended
    return ShortRun(short_config(WHOLE), workdir, ended[0][1]), [printed for _, printed in ended]


def nearly(value: Any) -> Any:
    """What equals a value of JSON whose fractions differ by rounding."""
    if isinstance(value, float):
        return pytest.approx(value, **ROUNDING)
    if isinstance(value, list):
        return [nearly(part) for part in value]
    return {name: nearly(part) for name, part in value.items()} if isinstance(value, dict) else value


def test_run_over_two_processes_is_that_of_one(alone, together):
    run, _ = together
    assert [line["step"] for line in run.metrics] == list(range(1, STEPS + 1))
    for line, there in zip(run.metrics, alone.metrics, strict=True):
        assert line.keys() == there.keys()
        for name in line.keys() - {"lane_use"}:  # the only one that speaks of the devices
            assert line[name] == pytest.approx(there[name], **ROUNDING), name
    rollouts, there = (read_records(r.workdir / "rollouts.jsonl") for r in (run, alone))
    assert len(there) == STEPS * run.config.prompts_per_step * run.config.rollout.samples
    assert rollouts == nearly(there)
    for name in ("before", "after"):
        assert run.completions(name) == alone.completions(name)
        assert run.result[name] == alone.result[name]
    exported, expected = (load_file(r.workdir / "export" / "model.safetensors") for r in (run, alone))
    for name, weight in expected.items():
        np.testing.assert_allclose(exported[name], weight, rtol=1e-3, atol=1e-4, err_msg=name)


def test_only_the_first_process_speaks(together):
    _, (first, second) = together
    assert "checkpoint:" in first and "accuracy" in first
    assert "checkpoint:" not in second and "accuracy" not in second


def test_checkpoint_of_two_processes_opens_in_one(together):
    run, _ = together
    opened = checkpoint.open_model(run.workdir)
    exported = load_file(run.workdir / "export" / "model.safetensors")
    np.testing.assert_array_equal(opened.params["embed_VD"], exported["model.embed_tokens.weight"])


@pytest.mark.parametrize("killed", [0, 1])
def test_process_whose_peer_is_killed_ends_promptly_and_says_why(killed):
    ended = processes("die", str(killed), **HEARTBEAT)
    assert ended[killed][0] == -signal.SIGKILL
    assert_left_alone(ended[1 - killed])


LOST = (
    "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed",
    "FAILED_PRECONDITION: Gloo context initialization failed: connect timeout",
    "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted",
    "UNAVAILABLE: Socket closed\nAdditional GRPC error information from remote target coordination_service",
    "DEADLINE_EXCEEDED: Barrier timed out. Id: step:7. This usually happens because a task",
    "INTERNAL: Barrier failed because: task 1 is unhealthy",
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n/job:jax_worker/task:1",
    "UNAVAILABLE: Task 1 heartbeat timeout. This indicates that the remote task has failed, got preempted",
)
OTHERS = (
    "503 UNAVAILABLE: the bucket's server asks for patience",
    "503 GET https://storage.googleapis.com/storage/v1/b/runs: Service Unavailable",
    "wandb: the heartbeat of the run failed: UNAVAILABLE",
    "the Barrier option of the reward failed",
    "config.data.name: no such file or folder: Gloom/coordination service.jsonl",
)


def test_only_what_jax_and_gloo_say_is_told_as_the_end_of_another_process():
    assert [text for text in LOST if not distributed.LOST.search(text)] == []
    assert [text for text in OTHERS if distributed.LOST.search(text)] == []


@pytest.mark.parametrize(
    ("process", "how", "code", "said"),
    [
        (0, "mistake", 2, "step_grpo: error: config.seed: of this process alone\n"),
        (1, "disk", 75, "step_grpo: error: /disk/file: No space left on device; make room"),
        (1, "input", 1, "Input/output error: '/disk/file'\n"),
        (0, "interrupt", 130, "step_grpo: stopped by Ctrl-C\n"),
    ],
)
def test_error_of_one_process_ends_all_promptly(process, how, code, said):
    ended = processes("fail", str(process), how, **HEARTBEAT)
    assert ended[process][0] == code and said in ended[process][1], ended
    assert_left_alone(ended[1 - process])


# ---------------------------------------------------------------------- who is who


def test_addresses_are_given_together_or_not_at_all():
    names = (distributed.COORDINATOR, distributed.PROCESSES, distributed.PROCESS)
    given = dict(zip(names, ("host:1234", "3", "2"), strict=True))
    assert distributed.given_addresses(given) == ("host:1234", 3, 2)
    assert distributed.given_addresses({}) is None
    for name in names:
        with pytest.raises(UserError, match=f"{name} is not set"):
            distributed.given_addresses({k: v for k, v in given.items() if k != name})
    for name, value in zip(names, ("host", "0", "3"), strict=True):
        with pytest.raises(UserError, match=f"{name} is '?{value}"):
            distributed.given_addresses({**given, name: value})


SLURM = dict.fromkeys(distributed.SLURM, "1") | {"SLURM_NTASKS": "4"}


@pytest.mark.parametrize(
    ("environ", "on_tpu", "metadata", "processes"),
    [
        ({}, False, {}, 1),
        (SLURM, False, {}, 4),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, {}, 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, {}, 2),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"}, True, {}, 4),
        ({}, True, {"worker-network-endpoints": "x:1:a,x:1:b,x:1:c"}, 3),
        ({}, True, {"worker-network-endpoints": "x:1:a", "tpu-env": "MEGASCALE_NUM_SLICES: '2'"}, 2),
        ({}, True, {}, 1),
    ],
)
def test_cluster_is_found_by_its_signs(environ, on_tpu, metadata, processes):
    found = distributed.cluster_size(environ, lambda name: metadata.get(name, ""), on_tpu=on_tpu)
    assert found == processes


@pytest.mark.parametrize(
    ("answers", "asked", "found"),
    [([503, 200], 2, "a,b"), ([404, 200], 1, ""), ([503] * 9, 1 + len(distributed.ASKED_AGAIN_AFTER), "")],
)
def test_metadata_server_that_does_not_answer_is_asked_again(answers, asked, found, monkeypatch):
    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            code = answers[len(paths)]
            paths.append(self.path)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b"a,b" if code == 200 else b"no such attribute")

        def log_message(self, *_):
            pass

    paths, waits = [], []
    with HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        monkeypatch.setattr(distributed.time, "sleep", waits.append)
        assert distributed.metadata("worker-network-endpoints") == found
        server.shutdown()
    assert paths == ["/computeMetadata/v1/instance/attributes/worker-network-endpoints"] * asked


def test_processes_that_would_run_something_else_are_refused_by_the_field():
    same = {"config.seed": "0", "--workdir": "/a"}
    distributed.check_equal([same, dict(same)])
    with pytest.raises(UserError, match="--workdir is /a in process 0 and /b in process 1"):
        distributed.check_equal([same, {**same, "--workdir": "/b"}])
    with pytest.raises(UserError, match=r"config\.seed is 0 in process 0 and None in process 2"):
        distributed.check_equal([same, same, {"--workdir": "/a"}])


def test_other_config_in_one_process_stops_both_with_its_name(tmp_path):
    """Through the whole command line: one process is given another seed."""
    worker = tmp_path / "out"
    ended = processes("disagree", str(worker), SEED_0="0", SEED_1="1")
    for code, printed in ended:
        assert code == 2 and "config.seed is 0 in process 0 and 1 in process 1" in printed, printed
    assert not Path(worker).exists()


def test_other_data_in_one_process_stops_both(tmp_path):
    """The same file name, and in one place two of the questions have changed places."""
    rows = [json.dumps({"problem": f"{n}+1", "answer": str(n + 1)}) + "\n" for n in range(3)]
    for name, order in (("a", (0, 1, 2)), ("b", (0, 2, 1))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(rows[n] for n in order))
    data = {"source": "jsonl", "name": "rows.jsonl", "prompt_column": "problem", "answer_column": "answer"}
    folders = {f"FOLDER_{process}": str(tmp_path / name) for process, name in enumerate("ab")}
    for code, printed in processes("disagree_on_data", json.dumps({"data": data}), **folders):
        assert code == 2, printed
        assert re.search(
            r"error: config\.data is 3 prompts with the checksum (\w+) in process 0 and 3 prompts with the "
            r"checksum (?!\1)\w+ in process 1; every host must run the same line, from the same files\n",
            printed,
        )
