# COCO 2017 without masks, with DETR's augmentation: multi-scale, and half of the images cropped.
# Unlike in mmdet's DINO, images without objects are left out (filter_empty_gt of the base), and
# every crop contains an object.
_base_ = ["mmdet::_base_/datasets/coco_detection.py", "crop.py"]
dataset_type = "CheckedCocoDataset"
train_pipeline = [
    dict(type="LoadReadableImage"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [_base_.resize],
            [
                dict(_base_.resize, scales=[(400, 4200), (500, 4200), (600, 4200)]),
                dict(_base_.crop, allow_negative_crop=False),
                _base_.resize,
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(type=dataset_type, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(type=dataset_type))
test_dataloader = val_dataloader
val_evaluator = dict(type="CheckedCocoMetric")
test_evaluator = val_evaluator
