"""Evaluates a detector.

python -m detection.test CONFIG CHECKPOINT
"""

from mmdet.evaluation import DumpDetResults

from flash_internimage.openmmlab.programs import evaluation_parser, evaluation_runner


def main() -> None:
    args = evaluation_parser("detection.test", "Evaluate a detector.").parse_args()
    runner = evaluation_runner(args)
    if args.out:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=str(args.out)))
    runner.test()


if __name__ == "__main__":
    main()
