# 8 GPUs x 2 images
_base_ = [
    "../_base_/backbones/internimage_b.py",
    "_base_/models/mask_rcnn.py",
    "_base_/datasets/coco_instance.py",
    "_base_/schedules/adamw_1x.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(**_base_.backbone, drop_path_rate=0.4, with_cp=False),
    neck=dict(type="FPN", in_channels=_base_.channels),
)
