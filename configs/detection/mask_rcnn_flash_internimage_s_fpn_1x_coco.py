# 8 GPUs x 2 images
_base_ = [
    "_base_/models/mask_rcnn.py",
    "_base_/datasets/coco_instance.py",
    "_base_/schedules/adamw_1x.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(
        arch="small",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="flash_internimage_small.in1k"),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
