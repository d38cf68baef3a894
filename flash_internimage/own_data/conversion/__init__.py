"""Convert the files of annotation tools to COCO or label maps."""
