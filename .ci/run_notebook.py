"""Runs the cells of docs/colab.ipynb that need no GPU, and prints their output. Needs nbclient and ipykernel.

    python .ci/run_notebook.py

One of them is the demo, with the README's command.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
MOST_SECONDS = 1800  # of a cell

notebook = nbformat.read(ROOT / "docs" / "colab.ipynb", as_version=4)
where = {"metadata": {"path": str(ROOT)}}
NotebookClient(notebook, timeout=MOST_SECONDS, skip_cells_with_tag="gpu", resources=where).execute()
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        print(output.get("text", ""))
