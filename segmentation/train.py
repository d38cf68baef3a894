"""Trains a segmentor.

python -m segmentation.train CONFIG
torchrun --nproc-per-node 8 -m segmentation.train CONFIG
"""

from flash_internimage.openmmlab.programs import training_parser, training_runner


def main() -> None:
    args = training_parser("segmentation.train", "Train a segmentor.").parse_args()
    training_runner(args).train()


if __name__ == "__main__":
    main()
