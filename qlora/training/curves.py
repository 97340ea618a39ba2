"""Loss curves from the log history of the Trainer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = ("-", "--", ":", "-.")


def draw_losses(runs: dict[str, list[dict]], path: str | Path):
    """Writes the figure of `loss_figure` to a file.

    Args:
        runs: label -> the Trainer's log history.
        path: of the file; its suffix gives the format.
    """
    with atomic_file(Path(path)) as partial:
        loss_figure(runs).savefig(partial)


def loss_figure(runs: dict[str, list[dict]]) -> "Figure":
    """Draws training and evaluation loss over the optimizer steps, and the learning rate if there is only one run.

    Args:
        runs: label -> the Trainer's log history.
    """
    from matplotlib.figure import Figure  # imported here: it takes a second, and only the end of a run needs it

    figure = Figure(figsize=(7, 4), dpi=120, layout="tight")
    axes = figure.subplots()
    for number, (label, history) in enumerate(runs.items()):
        style = {"color": f"C{number}", "linestyle": STYLES[number % len(STYLES)]}
        plot(axes, history, "loss", f"{label}, training", linewidth=2, **style)
        plot(axes, history, "eval_loss", f"{label}, evaluation", marker="o", alpha=0.6, **style)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.3)
    lines = axes.get_lines()
    if len(runs) == 1:
        rate_axes = axes.twinx()
        plot(rate_axes, history, "learning_rate", "learning rate", color="0.6", linewidth=1)
        rate_axes.set_ylabel("learning rate", color="0.5")
        rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        rate_axes.set_ylim(bottom=0)
        lines = [*lines, *rate_axes.get_lines()]
    if lines:
        axes.legend(handles=lines)
    return figure


def plot(axes: "Axes", history: list[dict], key: str, label: str, **style: Any):
    """Draws a line through the values logged under a key; a dot if there is only one."""
    points = [(entry["step"], entry[key]) for entry in history if key in entry]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **({"marker": "."} if len(points) == 1 else {}) | style)


def read_history(run: str) -> list[dict]:
    """Reads the log history of a finished run or of a checkpoint.

    Args:
        run: the folder.
    Raises:
        FileNotFoundError: there is no trainer_state.json in it.
    """
    path = Path(run) / "trainer_state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is no output folder of a run: there is no trainer_state.json in it.")
    return json.loads(path.read_text(encoding="utf-8"))["log_history"]
