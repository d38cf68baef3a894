"""Trains a segmentor.

python -m segmentation.train CONFIG
torchrun --nproc-per-node 8 -m segmentation.train CONFIG
"""

from flash_internimage.openmmlab.programs import one_line_errors, training_parser, training_runner


def main() -> None:
    args = training_parser("segmentation.train", "Train a segmentor.").parse_args()
    with one_line_errors():
        runner = training_runner(args)
    runner.train()


if __name__ == "__main__":
    main()
