"""The example for several hosts, as a person starts it: however the devices share the work, the losses are the same."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import each_command
import numpy as np
import pytest
import tolerance
from cases import exhaustive

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "distributed.py"
STEPS, BATCH, SIZE, NORMS = 4, 4, 8, 4
# A process that waits for another in vain would wait for minutes.
SECONDS = 150


def environment(devices):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_", "PJRT_"))}
    return {**kept, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train(folder, *, processes=1, devices=1, space=1):
    """What a run reports; devices is their number in each process. Shows what the processes say where one fails."""
    command = [sys.executable, SCRIPT, "--json", "--steps", STEPS, "--batch", BATCH, "--size", SIZE, "--space", space]
    if processes > 1:
        command += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", processes]
    started = []
    try:
        for i in range(processes):
            this = ["--process", i] if processes > 1 else []
            with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
                arguments = map(str, [*command, *this])
                started.append(subprocess.Popen(arguments, env=environment(devices), stdout=out, stderr=err))
        wait(started)
    finally:
        for process in started:
            process.kill()
            process.wait()

    errors = "\n".join(f"process {i}: {(folder / f'{i}.err').read_text()[-3000:]}" for i in range(processes))
    assert [process.returncode for process in started] == [0] * processes, errors
    # The library that connects the processes prints too.
    outputs = [(folder / f"{i}.out").read_text().splitlines() for i in range(processes)]
    reports = [[line for line in lines if line.startswith("{")] for lines in outputs]
    assert list(map(len, reports)) == [1] + [0] * (processes - 1)
    return json.loads(reports[0][0])


def wait(processes):
    """Until all have ended well, or one has not, or the time is over."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    ("processes", "devices", "space"),
    [
        pytest.param(2, 1, 1, id="two processes share the batch", marks=exhaustive),
        pytest.param(1, 4, 4, id="four devices share every volume"),
        pytest.param(2, 2, 2, id="processes share the batch, and devices every volume", marks=exhaustive),
    ],
)
def test_losses_are_those_of_one_device(tmp_path, alone, processes, devices, space):
    shared = train(tmp_path, processes=processes, devices=devices, space=space)
    assert alone["mesh"] == {"data": 1, "space": 1}
    assert shared["mesh"] == {"data": processes * devices // space, "space": space}

    expected, losses = np.array(alone["losses"]), np.array(shared["losses"])
    assert len(losses) == STEPS
    assert expected[-1] < 0.8 * expected[0]
    # The same numbers are added up in another order. Each norm rounds, in both runs, and each step starts from what
    # the one before it left.
    rounding = 2 * NORMS * tolerance.arithmetic("float32", SIZE**3)
    assert np.all(abs(losses / expected - 1) < rounding * np.arange(1, STEPS + 1))


WRONG = {
    "--space 4": "--space must divide the number of devices, 6: got 4",
    "--batch 8 --space 2": "--batch must be a multiple of 3",
    "--batch 6 --space 3 --size 16": "--size must be a multiple of 6",
    "--steps 1": "at least 2",
    "--process 0": "need --coordinator",
    "--coordinator 127.0.0.1:1 --processes 2": "needs --processes P and --process",
    "--coordinator 127.0.0.1:1 --processes 2 --process 2": "0, 1, ... P - 1",
    "--cluster --coordinator 127.0.0.1:1": "not allowed with",
    "--cluster --process 0": "need --coordinator",
}


def test_wrong_input_gets_one_line():
    each_command.assert_refused(SCRIPT, WRONG, env=environment(6), timeout=SECONDS)
