"""Runs a script once for each command line, in one process; prints [exit status, what it said to stderr] as JSON lines.

python tests/each_command.py examples/stylize.py '[["--size", "50"], ["--steps", "0"]]'
"""

import contextlib
import io
import json
import runpy
import subprocess
import sys


def assert_refused(script, wrong, *, timeout=240, **options):
    """Each command line of a dict gets status 2, and its message in the last line.

    Args:
      script: a path.
      wrong: {command line: part of the message}.
      timeout, options: of subprocess.run.
    """
    commands = json.dumps([line.split() for line in wrong])
    command = [sys.executable, __file__, script, commands]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)
    assert finished.returncode == 0, finished.stderr
    for (line, message), printed in zip(wrong.items(), finished.stdout.splitlines(), strict=True):
        status, said = json.loads(printed)
        assert status == 2, line
        assert message in said.splitlines()[-1]
        assert "Traceback" not in said


def run(script, arguments):
    sys.argv, said, status = [script, *arguments], io.StringIO(), 0
    with contextlib.redirect_stderr(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code
    return status, said.getvalue()


if __name__ == "__main__":
    script, commands = sys.argv[1:]
    sys.path.insert(0, script.rpartition("/")[0])
    for arguments in json.loads(commands):
        print(json.dumps(run(script, arguments)))
