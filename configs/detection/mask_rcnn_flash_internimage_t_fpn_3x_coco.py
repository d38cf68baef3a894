# 32 GPUs x 2 images
_base_ = [
    "_base_/models/mask_rcnn.py",
    "_base_/datasets/coco_instance_crop.py",
    "_base_/schedules/adamw_3x.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(
        arch="tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="flash_internimage_tiny.in1k"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))  # as published; S and B use 2e-4
