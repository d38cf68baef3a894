"""Train a detector.

Example::

    python -m detection.train CONFIG
    torchrun --nproc-per-node 8 -m detection.train CONFIG
"""

from flash_internimage.openmmlab.cli import train


def main() -> None:
    """Parse the command line and train a detector."""
    train.main("python -m detection.train", "Train a detector.")


if __name__ == "__main__":
    main()
