"""Runs one case in a process of its own, with a time limit.

What is checked may refuse to launch, which aborts the process, or wait for ever at a wrong barrier: neither must take
the other cases along.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from jaxnorm.arguments import without_addresses

Outcome = Literal["done", "failed", "died", "hung"]
# Of what a process that died has said last.
_LINES, _CHARACTERS = 4, 600


@dataclasses.dataclass(frozen=True)
class Job:
    """A call in another process.

    Attributes:
      function: "module:name"; it returns a dict that JSON can hold.
      arguments: of it, by name, such that JSON can hold them.
      seconds: how long the process may take.
    """

    function: str
    arguments: dict[str, Any]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Ended:
    """What came of a job.

    Attributes:
      outcome: "done"; "failed" with an exception; "died" without one; "hung" until it was killed.
      result: what the function returned, if it is done.
      reason: why it is not.
      seconds: that it took.
    """

    outcome: Outcome
    result: dict[str, Any] | None
    reason: str | None
    seconds: float


def run(job: Job) -> Ended:
    """Runs a job to its end, or to its limit."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer, said = Path(folder, "answer"), Path(folder, "said")
        with said.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(answer)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=_environment(),
                text=True,
                # Its own group of processes, so that what it has started ends with it.
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps([job.function, job.arguments]), timeout=job.seconds)
            except subprocess.TimeoutExpired:
                reason = f"not over after {job.seconds:.0f} s, then killed"
                return Ended("hung", None, reason, time.monotonic() - start)
            finally:
                # On a keyboard interrupt too.
                _kill(process)
        seconds = time.monotonic() - start
        if not answer.exists():
            return Ended("died", None, f"{_end(process.returncode)}: {_last(said)}", seconds)
        result, error = json.loads(answer.read_text())
    return Ended("done" if error is None else "failed", result, error, seconds)


def _environment() -> dict[str, str]:
    environment = dict(os.environ)
    # From a checkout, without installation.
    here = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, environment.get("PYTHONPATH")]))
    # A process that is killed must not leave the next one without memory.
    environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Where kernels are interpreted, thread blocks are threads that wait for each other.
    environment.setdefault("PJRT_NPROC", "16")
    return environment


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that waits in the driver may take its time, or never come.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def _end(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def _last(said: Path) -> str:
    lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
    return without_addresses(" / ".join(lines[-_LINES:]))[-_CHARACTERS:] or "it said nothing"


def _main() -> None:
    name, arguments = json.loads(sys.stdin.read())
    module, _, function = name.partition(":")
    answer: tuple[Any, str | None]
    try:
        answer = getattr(importlib.import_module(module), function)(**arguments), None
    # Whatever it is goes into the row.
    except Exception as error:
        answer = None, without_addresses(f"{type(error).__name__}: {error}")[:_CHARACTERS]
    # At once, or not at all.
    finished = Path(sys.argv[1] + ".part")
    finished.write_text(json.dumps(answer, allow_nan=False))
    finished.rename(sys.argv[1])


if __name__ == "__main__":
    _main()
