"""Runs a script once for each command line, in one process; prints [exit status, what it said to stderr] as JSON lines.

python tests/each_command.py examples/stylize.py '[["--size", "50"], ["--steps", "0"]]'
"""

import contextlib
import io
import json
import runpy
import sys


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
