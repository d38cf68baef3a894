"""Train a segmentor.

Example::

    python -m segmentation.train CONFIG
    torchrun --nproc-per-node 8 -m segmentation.train CONFIG
"""

from flash_internimage.openmmlab.errors import one_line_errors
from flash_internimage.openmmlab.programs import run_training, training_parser


def main() -> None:
    """Parse the command line and train a segmentor."""
    args = training_parser("segmentation.train", "Train a segmentor.").parse_args()
    with one_line_errors():
        run_training(args)


if __name__ == "__main__":
    main()
