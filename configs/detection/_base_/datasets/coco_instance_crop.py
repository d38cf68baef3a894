# COCO 2017 with masks and DETR's augmentation: multi-scale, and half of the images cropped.
_base_ = ["coco_instance.py", "crop.py"]
train_pipeline = [
    dict(type="LoadReadableImage"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(
        type="RandomChoice",
        transforms=[
            [_base_.resize],
            [
                dict(_base_.resize, scales=[(400, 1333), (500, 1333), (600, 1333)]),
                dict(_base_.crop, allow_negative_crop=True),
                _base_.resize,
            ],
        ],
    ),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
