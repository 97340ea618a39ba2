"""Draw the loss curves of one or more runs, or of checkpoints, from their own logs.

python scripts/plot_loss.py saved_files/a saved_files/b --output loss.png
"""

import argparse
from pathlib import Path

from qlora.errors import message_instead_of_traceback, one_line_on_interrupt
from qlora.training.curves import draw_losses, read_history


@one_line_on_interrupt()
def main():
    args = parse_args()
    with message_instead_of_traceback():
        draw_losses({Path(run).name: read_history(run) for run in args.runs}, args.output)
    print(f"Wrote {args.output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", help="Output folders of runs; a folder's name labels its curves.")
    parser.add_argument("--output", default="loss.png", help="Picture to write.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
