"""A contender in a process of its own: another copy of jaxnorm, or PyTorch under another interpreter.

The parent and the worker exchange one JSON object per line. The worker first says who it is; then each line that the
parent sends is either a case to prepare or a number of calls to time:

    {"shape": [4, [64, 64], 256], "layout": "channels-last", ...}   ->  {}
    {"calls": 3}                                                    ->  {"seconds": per call}

JAX is imported only by the worker that needs it, because the interpreter of PyTorch may not have it.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.turns import Turn, wall_turn

ROOT = pathlib.Path(__file__).parents[1]


class WorkerError(Exception):
    """The process cannot be started, or it ended. The message is one line."""


class Worker:
    """A running process.

    Args:
      command: starts it.
      environment: what is added to this process's environment.
    """

    def __init__(self, command: list[str], **environment: str):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
        try:
            self._process = subprocess.Popen(command, **pipes, text=True, env=environment)
        except OSError as error:
            raise WorkerError(f"cannot start {command[0]}: {error.strerror}") from error
        self.hello = self._answer()

    def close(self) -> None:
        self._process.communicate()

    def turn(self, case: Any) -> Turn:
        """Prepares the case, a dataclass, in place of the one before."""
        self._ask(dataclasses.asdict(case))
        return lambda calls: self._ask({"calls": calls})["seconds"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise WorkerError("the process ended: " + (errors.strip().splitlines() or ["without a message"])[-1])
        return json.loads(line)


def jaxnorm_worker(path: pathlib.Path) -> Worker:
    """The copy of jaxnorm in that folder. -P keeps Python from looking for jaxnorm in the current folder first."""
    return Worker([sys.executable, "-P", "-m", "benchmarks.worker", str(path)])


def torch_worker(python: str) -> Worker:
    """PyTorch in that interpreter."""
    # GNU OpenMP's threads spin for up to 20 ms before they sleep. Where another process wants a core, those that work
    # wait for those that spin: 50 ms for a call of 3 ms. So many spins, under 1 ms, cost nothing on an idle machine
    # and little on a busy one; threads that sleep at once would make small calls several times slower.
    return Worker([python, "-P", "-m", "benchmarks.torch_worker"], GOMP_SPINCOUNT="10000")


def serve(hello: dict[str, Any], prepare: Callable[[dict[str, Any]], Callable[[], Any]]) -> None:
    """Answers until the parent closes the pipe.

    Args:
      hello: the first answer.
      prepare: turns a case into a function that makes one call and waits for it.
    """
    print(json.dumps(hello), flush=True)
    turn: Turn | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if "calls" in request:
            answer = {"seconds": turn(request["calls"])}
        else:
            turn, answer = wall_turn(prepare(request)), {}
        print(json.dumps(answer), flush=True)


def main() -> None:
    """Times the copy of jaxnorm in the folder that the command line names."""
    folder = pathlib.Path(sys.argv[1]).resolve()
    # Only jaxnorm comes from there: the benchmarks of that copy may be others.
    sys.path.insert(0, str(folder))
    import jaxnorm

    sys.path.remove(str(folder))
    if folder not in pathlib.Path(jaxnorm.__file__).parents:
        sys.exit(f"no package jaxnorm in {folder}")
    from benchmarks.contenders import JAXNORM, arguments, call
    from benchmarks.shapes import Case

    def prepare(request: dict[str, Any]) -> Callable[[], Any]:
        case = Case.from_json(request)
        return call(JAXNORM, case, arguments(case))

    serve({"version": jaxnorm.__version__}, prepare)


if __name__ == "__main__":
    main()
