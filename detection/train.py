"""Train a detector.

Example::

    python -m detection.train CONFIG
    torchrun --nproc-per-node 8 -m detection.train CONFIG
"""

from flash_internimage.openmmlab.errors import one_line_errors
from flash_internimage.openmmlab.programs import run_training, training_parser


def main() -> None:
    """Parse the command line and train a detector."""
    args = training_parser("detection.train", "Train a detector.").parse_args()
    with one_line_errors():
        run_training(args)


if __name__ == "__main__":
    main()
