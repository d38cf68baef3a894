"""Train a segmentor.

Example::

    python -m segmentation.train CONFIG
    torchrun --nproc-per-node 8 -m segmentation.train CONFIG
"""

from flash_internimage.openmmlab.cli import train


def main() -> None:
    """Parse the command line and train a segmentor."""
    train.main("python -m segmentation.train", "Train a segmentor.")


if __name__ == "__main__":
    main()
