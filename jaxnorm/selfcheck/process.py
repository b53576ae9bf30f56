"""Runs a function in a process of its own, with a time limit.

A kernel may refuse to launch, which aborts the process, or wait forever at a wrong barrier. The other cases are run
anyway.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

from jaxnorm.arguments import without_addresses

# A process that is forked would have a copy of JAX's threads, which do not run there.
_SPAWN = multiprocessing.get_context("spawn")
_ENVIRONMENT = {
    # A process that is killed must not leave the next one without memory.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # In the interpreter thread blocks are threads that wait for each other.
    "PJRT_NPROC": "16",
}
# How much we report of what a dead process printed last.
_LINES, _CHARACTERS = 4, 600


class Job(NamedTuple):
    """A call in another process.

    Attributes:
      function: found by its name there; it returns a dict with its "outcome".
      arguments: by name.
      limit: seconds that the process may take.
    """

    function: Callable[..., dict[str, Any]]
    arguments: dict[str, Any]
    limit: float


def run(job: Job) -> dict[str, Any]:
    """Runs a job to its end, or to its limit.

    Returns:
      What the function returned, or the outcome "failed" (an exception), "died" (the process ended without an answer)
      or "hung" (it was killed at its limit) with the reason; and the seconds taken.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, "printed")
        receiver, sender = _SPAWN.Pipe(duplex=False)
        process = _SPAWN.Process(target=_child, args=(job, sender, printed))
        process.start()
        # Without our own end of the pipe, it is closed when the process ends.
        sender.close()
        try:
            found = {"outcome": "hung", "reason": f"not over after {job.limit:.0f} s, then killed"}
            if receiver.poll(job.limit):
                found = receiver.recv()
        except EOFError:
            process.join()
            found = {"outcome": "died", "reason": f"{_end(process.exitcode or 0)}: {_last(printed)}"}
        finally:
            # After a keyboard interrupt, too.
            _kill(process)
    return found | {"seconds taken": round(time.monotonic() - start, 1)}


def _child(job: Job, sender: Connection, printed: Path) -> None:
    # It gets its own group of processes.
    os.setsid()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with printed.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        answer = job.function(**job.arguments)
    # Any exception is a row of the report.
    except Exception as error:
        answer = {"outcome": "failed", "reason": without_addresses(f"{type(error).__name__}: {error}")[:_CHARACTERS]}
    sender.send(answer)


def _kill(process: SpawnProcess) -> None:
    """Ends the process and whatever it has started."""
    process.kill()
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    # A process that waits in the driver may take a while to end, or never end.
    process.join(10)


def _end(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def _last(printed: Path) -> str:
    text = printed.read_text(errors="replace") if printed.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return without_addresses(" / ".join(lines[-_LINES:]))[-_CHARACTERS:] or "it printed nothing"
