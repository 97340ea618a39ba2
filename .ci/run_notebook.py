"""Runs the cells of docs/colab.ipynb that need no GPU, and prints their output. Needs nbclient and ipykernel.

    python .ci/run_notebook.py

One of them is the demo, with the README's command. A command of a cell that fails ends the run, which a notebook by
itself does not do.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
MOST_SECONDS = 1800  # of a cell
# IPython keeps the exit status of the last `!` command in `_exit_code`.
RAISE_FAILURE = "\nif globals().get('_exit_code'):\n    raise RuntimeError(f'exit status {_exit_code}')"

notebook = nbformat.read(ROOT / "docs" / "colab.ipynb", as_version=4)
for cell in notebook.cells:
    if cell.cell_type == "code":
        cell.source += RAISE_FAILURE
where = {"metadata": {"path": str(ROOT)}}
try:
    NotebookClient(notebook, timeout=MOST_SECONDS, skip_cells_with_tag="gpu", resources=where).execute()
finally:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            print(output.get("text", ""))
