"""The notebooks of the documentation: run in a kernel of their own, and kept with what they said.

`python tests/notebook_tools.py` runs all of them and stores their outputs.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import nbformat
from doc_pages import NOTEBOOKS, ROOT
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_SECONDS = 1800  # for a cell, or for a kernel to start: far more than any takes, so that a busy machine fails nothing
_OPTIONS = {"timeout": _SECONDS, "startup_timeout": _SECONDS, "record_timing": False, "coalesce_streams": True}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}


def read(path: Path) -> NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(path, as_version=4)


def executed(notebook: NotebookNode) -> NotebookNode:
    """A copy with the outputs of a fresh kernel, which works in an empty folder; a cell that fails raises."""
    fresh = copy.deepcopy(notebook)
    with tempfile.TemporaryDirectory() as folder:
        kernel = AsyncKernelManager(connection_file=f"{folder}/kernel.json", transport="ipc")
        NotebookClient(fresh, kernel, **_OPTIONS).execute(cleanup_kc=True, cwd=folder, env=os.environ | _OFFLINE)
    return fresh


def store(path: Path) -> None:
    """Run a notebook and keep it as it stands then, without anything of this machine."""
    notebook = executed(read(path))
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings and progress bars are about this machine and this moment
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for each in NOTEBOOKS:
        store(each)
        print(f"stored {each.relative_to(ROOT)}")
