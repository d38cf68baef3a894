# COCO 2017 with masks, at a single scale. The data preprocessor normalizes and pads.
_base_ = "mmdet::_base_/datasets/coco_instance.py"
dataset_type = "CheckedCocoDataset"
train_pipeline = [
    dict(type="LoadReadableImage"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(type=dataset_type, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type=dataset_type))
test_dataloader = val_dataloader
val_evaluator = dict(type="CheckedCocoMetric")
test_evaluator = val_evaluator
