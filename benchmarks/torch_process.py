"""The other end of torch_worker.py: PyTorch as a contender, with another interpreter where it has one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from turns import Turn

_WORKER = pathlib.Path(__file__).with_name("torch_worker.py")


class TorchError(Exception):
    """The interpreter cannot be started, or has no PyTorch, or PyTorch failed. The message is one line."""


class TorchProcess:
    """A running worker, to be used in a with statement."""

    def __init__(self, python: str):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        # GNU OpenMP's threads spin for up to 20 ms before they sleep. Where another process wants a core, those that
        # work wait for those that spin: 50 ms for a call of 3 ms. So many spins, under 1 ms, cost nothing on an idle
        # machine and little on a busy one; threads that sleep at once would make small calls several times slower.
        environment = os.environ | {"GOMP_SPINCOUNT": "10000"}
        try:
            self._process = subprocess.Popen([python, str(_WORKER)], **pipes, text=True, env=environment)
        except OSError as error:
            raise TorchError(f"cannot start {python}: {error.strerror}") from error
        hello = self._answer()
        self.version: str = hello["version"]
        self.threads: int = hello["threads"]

    def __enter__(self) -> "TorchProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def turn(self, shape: tuple[int, ...], layout: str, dtype: str, *, step: bool) -> Turn:
        """Prepares the case, in place of the one before; shape is (N, C, *spatial) in either layout."""
        self._ask({"shape": shape, "layout": layout, "dtype": dtype, "step": step})
        return lambda calls: self._ask({"calls": calls})["seconds"]

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            _, errors = self._process.communicate()
            raise TorchError("PyTorch's process ended: " + (errors.strip().splitlines() or ["without a word"])[-1])
        return json.loads(line)


def default_python() -> str | None:
    """This interpreter, if it has PyTorch."""
    return sys.executable if importlib.util.find_spec("torch") else None
