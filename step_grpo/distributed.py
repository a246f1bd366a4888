"""Several processes, one run: who they are, what each does for itself, and what they tell each other.

Every host runs the same line. `start` finds out whether there are others; with one process nothing here does
anything. The processes of a run share the workdir, compute the same schedule from the same integers, and
differ in two ways alone: each samples and grades its own prompts (`share`), and only the first one writes and
speaks.
"""

import json
import os
import re
import secrets
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

import step_grpo
from step_grpo import paths
from step_grpo.errors import TransientError, UserError
from step_grpo.mesh import use_all_cores

COORDINATOR, PROCESSES, PROCESS = "STEP_GRPO_COORDINATOR", "STEP_GRPO_PROCESSES", "STEP_GRPO_PROCESS"
HEARTBEAT = "STEP_GRPO_HEARTBEAT"
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
CHUNK = 2**20  # bytes of a process that pass the devices at a time; one size, so one program
HEADER = 16  # bytes: the process and the length of what it sends
SILENT_FOR = 60  # seconds without a sign of life, after which a process counts as dead
# What Gloo and JAX's coordination service say of it, and nobody else: a bucket is UNAVAILABLE too at times.
LOST = re.compile(
    r"Gloo [\w -]+ failed|Failed to send RPC to coordination service|target coordination_service"
    r"|CoordinationService/|[Cc]oordination service (?:has|is shutting|was)|JAX distributed service detected"
    r"|the remote task has failed|(?:Barrier|Shutdown barrier)[\w ]* (?:timed out\. Id:|failed(?: because)?:)"
    r"|stopped sending heartbeats"
)
LAST_WORDS = 3.0  # seconds that the others are given to say what this process has said
FOUND = threading.Event()  # set once the processes have found each other
ASKED_AGAIN_AFTER = (0.5, 1.0, 2.0)  # seconds
SEEN_WITHIN = 10.0  # seconds for a new file to be seen by all hosts
T = TypeVar("T")


def start(config: ConfigDict, workdir: Path, **flags: Any) -> None:
    """Begins a run, together with its other processes; call before anything of JAX runs.

    On the CPU each core becomes a device. All processes must run the same and see the same workdir; all but
    the first lose their standard output.

    Args:
        config: of the run.
        workdir: of the run.
        **flags: what else must be equal in all processes.

    Raises:
        UserError: the processes do not find each other, or are not to run the same.
    """
    join()
    use_all_cores()
    if jax.process_count() == 1:
        return
    agree(config, workdir=workdir, **flags)
    check_shared(workdir)
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends


def join() -> None:
    """Joins the other processes of the run, if there are any.

    Addresses that are given come first: `STEP_GRPO_COORDINATOR=HOST:PORT` of the first process,
    `STEP_GRPO_PROCESSES`, how many there are, and `STEP_GRPO_PROCESS`, which one this is, from 0. Without
    them JAX finds out by itself on TPU VMs, GKE (TPU) and SLURM. With one process nothing is done.

    Where a process dies, JAX ends the others: at once if it was the first one, else when it has been silent
    for `STEP_GRPO_HEARTBEAT` seconds (60).

    Raises:
        UserError: the addresses are wrong.
        TransientError: the others do not come.
    """
    if jax.distributed.is_initialized():
        return
    given = given_addresses(os.environ)
    silent_for = _number(os.environ, HEARTBEAT, 1) if HEARTBEAT in os.environ else SILENT_FOR
    initialize = partial(jax.distributed.initialize, heartbeat_timeout_seconds=silent_for)
    try:
        if given is None:
            _start_cluster(initialize)
        elif given[1] > 1:
            initialize(*given, cluster_detection_method="deactivate")
    except (RuntimeError, ValueError) as error:
        raise TransientError(
            f"the processes of the run did not find each other ({error}); run the same line on every host, "
            "as a new process"
        ) from None
    if jax.distributed.is_initialized():
        FOUND.set()


def _start_cluster(initialize: Callable[[], None]) -> None:
    platforms = jax.config.jax_platforms or ""  # type: ignore[attr-defined]  # JAX adds `tpu` if it finds one
    on_tpu = "tpu" in platforms.split(",")
    if cluster_size(os.environ, metadata, on_tpu=on_tpu) == 1:
        return
    initialize()
    if os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_STEP_NUM_NODES"):
        # JAX gives a task of SLURM one GPU; a task that has the node for itself takes all of them.
        jax.config.update("jax_cuda_visible_devices", "all")
        jax.config.update("jax_rocm_visible_devices", "all")


def given_addresses(environ: Mapping[str, str]) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and number of this one, as the environment names them.

    Returns:
        None where nothing is named.

    Raises:
        UserError: a variable is missing or wrong.
    """
    names = (COORDINATOR, PROCESSES, PROCESS)
    if not any(name in environ for name in names):
        return None
    for name in names:
        if name not in environ:
            raise UserError(f"{name} is not set; {', '.join(names)} are set together or not at all")
    if not re.fullmatch(r".+:\d+", environ[COORDINATOR]):
        raise UserError(f"{COORDINATOR} is {environ[COORDINATOR]!r}; it must be HOST:PORT of process 0")
    count, process = _number(environ, PROCESSES, 1), _number(environ, PROCESS, 0)
    if process >= count:
        raise UserError(f"{PROCESS} is {process}; it must be below {PROCESSES}, {count}")
    return environ[COORDINATOR], count, process


def _number(environ: Mapping[str, str], name: str, least: int) -> int:
    value = environ[name]
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)


def cluster_size(environ: Mapping[str, str], read_metadata: Callable[[str], str], *, on_tpu: bool) -> int:
    """How many processes the cluster started, by the signs that JAX goes by; 1 where there is no cluster.

    Args:
        environ: of the process.
        read_metadata: `metadata`.
        on_tpu: the run uses TPUs of this host.
    """
    if all(name in environ for name in SLURM):
        return int(environ["SLURM_NTASKS"])
    if not on_tpu:
        return 1
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES", "")
    slices = environ.get("MEGASCALE_NUM_SLICES", "")
    if "TPU_SKIP_MDS_QUERY" not in environ:
        hosts = hosts or read_metadata("worker-network-endpoints")
        described = re.search(r"MEGASCALE_NUM_SLICES: *'?(\d+)", "" if slices else read_metadata("tpu-env"))
        slices = described[1] if described else slices
    return len(hosts.split(",")) * int(slices or 1)


def metadata(name: str) -> str:
    """An attribute of a Google Cloud VM, empty where there is none.

    Without an answer it asks again: a host of a slice must not take itself for the only one.
    """
    return _ask_host(f"attributes/{name}", ASKED_AGAIN_AFTER)


def host_is_taken_away() -> str:
    """Why Google Cloud is about to end this machine, as its metadata say; empty while it does not."""
    if (event := _ask_host("maintenance-event")).startswith("TERMINATE"):
        return event
    return "preempted" if _ask_host("preempted") == "TRUE" else ""


def _ask_host(name: str, again_after: Sequence[float] = ()) -> str:
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    for wait in (*again_after, 0.0):
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as error:
            if error.code < 500:  # there is none
                return ""
        except OSError:  # no answer, or not on Google Cloud
            pass
        time.sleep(wait)
    return ""


# ---------------------------------------------------------------------- the end of one of them


def fail(error: Exception) -> None:
    """Ends one of several processes with exit code 1, whose run cannot go on; returns where it is alone.

    At once: JAX would wait for minutes at the end of a process until the others end too, while they wait for
    this one.

    Args:
        error: what ended the run; where it says that another process is gone, one line takes its place.
    """
    if not jax.distributed.is_initialized():
        return
    if LOST.search(str(error)):
        why = " ".join(str(error).split())[:200]
        print(
            f"step_grpo: error: another process of the run is gone ({why}); see what it printed, then start "
            "all of them again: they go on from the newest checkpoint",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def leave(code: int) -> None:
    """Ends one of several processes with an exit code; returns where it is alone.

    It does not wait until the others end too, as JAX would, for they may be waiting for this one. But they
    may be about to end for the same reason, and are given a few seconds to say so; the first process goes
    last, for its end is theirs.
    """
    if not jax.distributed.is_initialized():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if FOUND.is_set():
        time.sleep(LAST_WORDS * (2 if is_first() else 1))
    os._exit(code)


# ---------------------------------------------------------------------- who does what


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return jax.process_index() == 0


def only_first(path: Path) -> Path:
    """Where to write what all processes hold: the path, or nowhere for all but the first process."""
    return path if is_first() else Path(os.devnull)


def share(items: Sequence[T], field: str) -> list[T]:
    """Those that this process works on: every so-manieth, from its own number on.

    Args:
        items: the same in every process.
        field: of the config, that says how many there are.

    Raises:
        UserError: there are fewer items than processes.
    """
    _enough(len(items), field)
    return list(items[jax.process_index() :: jax.process_count()])


def _enough(count: int, field: str) -> None:
    if count < jax.process_count():
        raise UserError(f"{field}: {count} for {jax.process_count()} processes; give each at least one")


# ---------------------------------------------------------------------- what they agree on


def agree(config: ConfigDict, **flags: Any) -> None:
    """Makes sure that all processes run the same.

    Args:
        config: of the run.
        **flags: what else must be equal.

    Raises:
        UserError: naming the first field that differs, or what this number of processes does not allow.
    """
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        raise UserError(f"the hosts have {sorted(devices.values())} devices; they must have equally many")
    fields = jax.tree.leaves_with_path(config.to_dict())
    facts = {f"config.{jax.tree_util.keystr(path, simple=True, separator='.')}": v for path, v in fields}
    facts |= {f"--{name}": value for name, value in flags.items()}
    facts |= {"the version of step_grpo": step_grpo.__version__, "the version of JAX": jax.__version__}
    agree_on(facts)
    _enough(config.get("prompts_per_step", jax.process_count()), "config.prompts_per_step")


def agree_on(facts: Mapping[str, Any]) -> None:
    """Makes sure that something is the same in all processes; all must ask.

    Args:
        facts: by what a user knows them.

    Raises:
        UserError: naming the first that differs.
    """
    if jax.process_count() == 1:
        return
    written = json.dumps({name: str(value) for name, value in facts.items()})
    check_equal([json.loads(bytes(said["facts"])) for said in gather({"facts": as_bytes(written)})])


def check_equal(facts: Sequence[Mapping[str, str]]) -> None:
    """Refuses processes that would not run the same.

    Args:
        facts: what each process says of itself.

    Raises:
        UserError: naming the first field that differs.
    """
    for process, said in enumerate(facts):
        for field in sorted({*facts[0], *said}):
            if said.get(field) != facts[0].get(field):
                raise UserError(
                    f"{field} is {facts[0].get(field)} in process 0 and {said.get(field)} in process "
                    f"{process}; every host must run the same line, from the same files"
                )


def check_shared(folder: Path) -> None:
    """Makes sure that a folder is the same one for all processes.

    Raises:
        UserError: a process does not see what the first one writes there.
    """
    name = bytes(gather({"name": as_bytes(f".{secrets.token_hex(8)}")})[0]["name"]).decode()
    if is_first():
        paths.make(folder)
        (folder / name).write_text("")
    wait_for_all("written")
    until = time.monotonic() + SEEN_WITHIN
    while not (folder / name).exists() and time.monotonic() < until:
        time.sleep(0.1)
    seen = [bool(said["seen"]) for said in gather({"seen": np.array((folder / name).exists())})]
    if is_first():
        (folder / name).unlink()
    if not all(seen):
        raise UserError(
            f"--workdir={folder}: process {seen.index(False)} does not see what process 0 writes there; "
            "name a folder that all hosts share"
        )


# ---------------------------------------------------------------------- what they tell each other


def wait_for_all(name: str) -> None:
    """Goes on when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def anywhere(here: bool) -> bool:
    """Whether something is so in any of the processes; all must ask."""
    if jax.process_count() == 1:
        return here
    return any(bool(said["here"]) for said in gather({"here": np.array(here)}))


def from_first(action: Callable[[], T]) -> T:
    """What an action of the first process returns, in every process; only there it happens.

    Args:
        action: returns what JSON can hold.

    Raises:
        UserError: in every process, if the action raises one.
    """
    if jax.process_count() == 1:
        return action()
    said: dict[str, Any] = {}
    if is_first():
        try:
            said = {"result": action()}
        except UserError as error:
            said = {"error": str(error), "transient": isinstance(error, TransientError)}
    first = json.loads(bytes(gather({"said": as_bytes(json.dumps(said))})[0]["said"]))
    if "error" in first:
        raise (TransientError if first["transient"] else UserError)(first["error"])
    return first["result"]


def as_bytes(text: str) -> np.ndarray:
    """A text as an array that `gather` takes."""
    return np.frombuffer(text.encode(), np.uint8)


def gather(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """What every process says, in their order.

    Args:
        arrays: of this process, in any shapes; not of objects.
    """
    with BytesIO() as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy takes a name for `allow_pickle`
        said = file.getvalue()
    everything = []
    for other in _gather_bytes(said):
        with np.load(BytesIO(other), allow_pickle=False) as loaded:
            everything.append(dict(loaded))
    return everything


def _gather_bytes(said: bytes) -> list[bytes]:
    """The bytes of every process; they pass the devices in chunks of one size, as many as the longest has."""
    header = np.array([jax.process_index(), len(said)], np.int64).tobytes()
    stream = np.frombuffer(header + said, np.uint8)
    chunks: list[np.ndarray] = []
    most = 1
    while len(chunks) < most:
        chunk = np.zeros(CHUNK, np.uint8)
        part = stream[len(chunks) * CHUNK : (len(chunks) + 1) * CHUNK]
        chunk[: len(part)] = part
        chunks.append(multihost_utils.process_allgather(chunk).reshape(jax.process_count(), CHUNK))
        headers = chunks[0][:, :HEADER].copy().view(np.int64)
        most = -(-(HEADER + int(headers[:, 1].max())) // CHUNK)
    streams = np.concatenate(chunks, axis=1)
    return [streams[row, HEADER : HEADER + headers[row, 1]].tobytes() for row in np.argsort(headers[:, 0])]
