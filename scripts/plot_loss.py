"""Draw the training loss of one or more runs from their own logs, the trainer_state.json in each output_dir.

python scripts/plot_loss.py saved_files/a saved_files/b --output loss.png      (needs matplotlib)
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="Output folders of finished runs; a folder's name labels its curve.")
    parser.add_argument("--output", default="loss.png", help="Picture to write.")
    args = parser.parse_args()
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    styles = ["-", "--", ":", "-."]
    for number, run in enumerate(args.runs):
        steps, losses = read_losses(Path(run))
        axes.plot(steps, losses, styles[number % len(styles)], label=Path(run).name, linewidth=2)
    axes.set(xlabel="optimizer step", ylabel="training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(args.output)
    print(f"wrote {args.output}")


def read_losses(run: Path) -> tuple[list[int], list[float]]:
    """Steps and training losses that a run logged."""
    path = run / "trainer_state.json"
    if not path.is_file():
        raise SystemExit(
            f"error: {run} is not the output folder of a finished run: there is no trainer_state.json in it."
        )
    entries = [entry for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
    return [entry["step"] for entry in entries], [entry["loss"] for entry in entries]


if __name__ == "__main__":
    main()
