"""Real signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from short_run import ROOT

from step_grpo import preemption
from step_grpo.preemption import Notice, StoppedError


def asked(number: int, notice: Notice) -> None:
    """Sends this process a signal and waits until it is heard."""
    os.kill(os.getpid(), number)
    until = time.monotonic() + 10
    while not notice.came and time.monotonic() < until:
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_heard_once_and_handlers_are_put_back(number, capsys):
    before = signal.getsignal(number)
    with Notice() as notice:
        notice.stop_if_asked()
        asked(number, notice)
        assert notice.came == signal.Signals(number).name
        with pytest.raises(StoppedError):
            notice.stop_if_asked()
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err.count("saving what is done") == 1


def test_watched_engine_drops_the_rollout_after_the_segment_in_which_it_was_asked():
    segments = []

    def engine(params, prompts, samples, key, on_progress, limits=None):
        for finished in range(4):
            segments.append(finished)
            if finished == 1 and params == "asked":
                asked(signal.SIGTERM, notice)
            on_progress(finished)
        return "completions"

    engine.machine = "machine"
    with Notice() as notice:
        seen = []
        watched = notice.watched(engine)
        assert watched("unasked", [[1]], 1, None, seen.append) == "completions"
        assert (seen, watched.machine) == ([0, 1, 2, 3], "machine")
        segments.clear()
        with pytest.raises(StoppedError):
            watched("asked", [[1]], 1, None, on_drop=lambda: segments.append("dropped"))
        assert segments == [0, 1, "dropped"]


def test_what_goes_wrong_in_the_engine_is_not_taken_for_a_stop():
    def engine(*_, **__):
        raise ValueError("a prompt is empty")

    with Notice() as notice, pytest.raises(ValueError, match="empty"):
        notice.watched(SimpleNamespace(__call__=engine).__call__)(None, [], 1, None)


@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--requeue",), 75)])
def test_stopped_run_ends_with_0_and_where_it_is_to_be_queued_again_with_75(
    flags, code, tmp_path, monkeypatch
):
    from step_grpo import cli, main

    def stopped(*_):
        raise StoppedError("stopped; run the same line again")

    monkeypatch.setattr(main, "train", stopped)
    line = ["main", f"--config={ROOT / 'configs' / 'tiny.py'}", f"--workdir={tmp_path}", *flags]
    with pytest.raises(SystemExit) as ended:
        cli.run(main.main, line)
        sys.exit(0)
    assert ended.value.code == code


@pytest.fixture
def host(monkeypatch):
    """A metadata server; what it says is in the dictionary."""
    says = {"maintenance-event": "NONE", "preempted": "FALSE"}

    class Metadata(BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            if says.get("raw"):
                says["asked"] = says.get("asked", 0) + 1
                return self.wfile.write(says["raw"])
            self.send_response(200)
            self.end_headers()
            return self.wfile.write(says[self.path.removeprefix("/computeMetadata/v1/instance/")].encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(preemption, "HOST_ASKED_EVERY", 0.01)
    yield says
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "value", "came"),
    [
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"),
        ("preempted", "TRUE", "preempted"),
    ],
)
def test_notice_of_maintenance_stops_the_run_like_a_signal(host, name, value, came, capsys):
    with Notice(on_tpu=lambda: True) as notice:
        time.sleep(0.1)
        notice.stop_if_asked()
        host[name] = value
        until = time.monotonic() + 10
        while not notice.came and time.monotonic() < until:
            time.sleep(0.01)
        with pytest.raises(StoppedError):
            notice.stop_if_asked()
        os.kill(os.getpid(), signal.SIGTERM)  # a first signal: it does not end the process
        time.sleep(0.1)
        assert notice.came == came
    assert f"the host is about to be taken away ({came}): saving what is done" in capsys.readouterr().err


@pytest.mark.parametrize(
    "raw",
    [b"no HTTP\r\n\r\n", b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nNO", b"HTTP/1.0 200 OK\r\n\r\n\xff"],
)
def test_notice_is_still_heard_after_answers_that_cannot_be_read(host, raw):
    host["raw"] = raw
    with Notice(on_tpu=lambda: True) as notice:
        until = time.monotonic() + 10
        while host.get("asked", 0) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert not notice.came
        host.update(raw=b"", preempted="TRUE")
        while not notice.came and time.monotonic() < until:
            time.sleep(0.01)
        assert notice.came == "preempted"


def test_host_is_asked_on_a_tpu_alone(host):
    host["preempted"] = "TRUE"
    with Notice() as notice:
        time.sleep(0.1)
        assert not notice.came


DEAF = """
import hashlib, sys
from step_grpo.preemption import Notice
with Notice():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in one call, in which Python runs no handler
"""


def test_second_signal_ends_a_process_at_once_whatever_it_computes():
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM: saving what is done; once more to stop at once" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    process.communicate()
