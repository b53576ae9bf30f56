"""Runs notebooks top to bottom and writes them back with their outputs; stops at the first error.

python notebooks/execute.py notebooks/*.ipynb
"""

import pathlib
import sys

import nbformat
from nbclient import NotebookClient

# The kernel says more of itself, such as its version, which would change the files from machine to machine.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs. Nothing is written; an error in a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    folder = {"metadata": {"path": str(path.parent)}}
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    # The kernel warns that it talks over TCP; it does so with this process alone.
    options["extra_arguments"] = ["--log-level=ERROR"]
    NotebookClient(notebook, kernel_name="python3", resources=folder, **options).execute()
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main() -> None:
    for path in map(pathlib.Path, sys.argv[1:]):
        print(f"executing {path}", flush=True)
        nbformat.write(execute(path), path)


if __name__ == "__main__":
    main()
