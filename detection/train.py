"""Trains a detector.

python -m detection.train CONFIG
torchrun --nproc-per-node 8 -m detection.train CONFIG
"""

from flash_internimage.openmmlab.programs import one_line_errors, training_parser, training_runner


def main() -> None:
    args = training_parser("detection.train", "Train a detector.").parse_args()
    with one_line_errors():
        runner = training_runner(args)
    runner.train()


if __name__ == "__main__":
    main()
