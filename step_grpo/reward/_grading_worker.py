r"""The program of one grading process: math-verify behind hard limits.

`grading.Grader` runs this file as a script, so that neither JAX nor the caller's `__main__` is imported here.
It imports nothing of step_grpo. It speaks JSON, one object a line: `{"ready": true}` (or `{"fatal": why}`)
once, then for each request `{"answer": ..., "guess": ...}` one reply `{"correct": ..., "memory": ...}`. It
ends at the end of its input, so it does not outlive its parent.

Limits, outermost first: the parent kills it at the deadline; SIGALRM, left at its deadly default, does so a
little later where the parent is gone; the address space is bounded; and an audit hook refuses to start
programs, open sockets and change files, should an answer ever find a way to run code.
"""

import argparse
import functools
import gc
import importlib
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

_MIB = 2**20
_REMEMBERED = 2048  # parsed texts; many completions are compared with the same reference answer
_ALARM_SLACK = 1.0  # seconds after the deadline; the parent acts first, where there still is one
_FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.")
_HARMLESS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Judge = Callable[[str, str], bool]


def load_judge() -> Judge:
    """Imports math-verify and returns `judge(answer, guess)`: is the guess equal to the reference answer?"""
    logging.disable(logging.CRITICAL)  # it warns, once, that its own time limits are off: they are ours
    library: Any = importlib.import_module("math_verify")
    parse_in_two_stages()

    @functools.lru_cache(maxsize=_REMEMBERED)
    def parse(text: str) -> Any:
        return library.parse(f"\\boxed{{{text}}}", parsing_timeout=None)

    def judge(answer: str, guess: str) -> bool:
        return bool(library.verify(parse(answer), parse(guess), timeout_seconds=None))

    judge("\\frac{1}{2}", "x+1")  # the first answer builds parser tables: not on a real answer's time
    gc.collect()
    gc.freeze()  # the libraries stay for good: looking through them again and again would cost a tenth
    return judge


def parse_in_two_stages() -> None:
    """Makes math-verify's LaTeX parser predict without its context first, for the rest of this process.

    Its grammar is ambiguous, and most of the time goes into ANTLR's predictions with full context (LL), which
    are never cached. Those without (SLL) are. By ANTLR's documentation of prediction modes they lead to the
    tree that LL would have found, or to a syntax error; then a fresh parser tries again with LL. A version of
    the parser that is built differently is left as it is.
    """
    try:
        parsers: Any = importlib.import_module("latex2sympy2_extended.latex2sympy2")._Latex2Sympy
        modes: Any = importlib.import_module("antlr4.atn.PredictionMode").PredictionMode
        with_context = parsers.create_parser
    except (ImportError, AttributeError):
        return

    def create_parser(converter: Any, text: str) -> Any:
        parser = with_context(converter, text)
        parser._interp.predictionMode = modes.SLL
        tree = parser.math

        def math() -> Any:
            try:
                return tree()
            except (MemoryError, RecursionError):
                raise
            except Exception:  # what the parser's listeners raise at a syntax error
                return with_context(converter, text).math()

        parser.math = math
        return parser

    parsers.create_parser = create_parser


def confine(memory_mib: int) -> None:
    """Bounds the address space of this process and shuts the ways out of it, for good."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib * _MIB, memory_mib * _MIB))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[2], int) and args[2] & _WRITING
    if writes or (event.startswith(_FORBIDDEN) and event not in _HARMLESS):
        raise PermissionError(f"grading must not do this: {event}")


def peak_mib() -> float:
    """Returns the largest address space this process has had, in MiB; 0 where the system does not say."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmPeak:"))
    except (OSError, StopIteration):
        return 0.0


def serve(judge: Judge, requests: BinaryIO, replies: BinaryIO, deadline: float, memory_mib: int) -> None:
    """Answers requests until their end.

    math-verify takes a MemoryError for an ordinary failure to parse, so memory is also judged by its peak:
    `memory` is true once half of the bound has been in use. Below that, only a single request for the other
    half can have failed: a number of some billion digits, which no reference answer is.
    """
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, deadline + _ALARM_SLACK)
        try:
            correct, memory = judge(request["answer"], request["guess"]), False
        except MemoryError:
            correct, memory = False, True
        except Exception:
            # math-verify catches its own errors; one that escapes still means "not a readable answer".
            correct, memory = False, False
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, {"correct": correct, "memory": memory or peak_mib() > memory_mib / 2})


def _send(replies: BinaryIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message).encode("ascii") + b"\n")
    replies.flush()


def main() -> None:
    """Takes the limits from the command line, loads math-verify, and serves standard input."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--deadline", type=float, required=True)
    arguments.add_argument("--memory-mib", type=int, required=True)
    options = arguments.parse_args()
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints must not become a reply
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    try:
        judge = load_judge()
        if peak_mib() > options.memory_mib / 2:
            raise MemoryError(f"memory_mib={options.memory_mib} is too small: {peak_mib():.0f} MiB at rest")
        confine(options.memory_mib)
    except Exception as error:
        _send(replies, {"fatal": f"{type(error).__name__}: {error}"})
        return
    _send(replies, {"ready": True})
    serve(judge, sys.stdin.buffer, replies, options.deadline, options.memory_mib)


if __name__ == "__main__":
    main()
