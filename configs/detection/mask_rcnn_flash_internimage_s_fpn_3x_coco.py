# 8 GPUs x 8 images
_base_ = [
    "../_base_/backbones/s.py",
    "_base_/models/mask_rcnn.py",
    "_base_/datasets/coco_instance_crop.py",
    "_base_/schedules/adamw_3x.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(**_base_.backbone, drop_path_rate=0.4),
    neck=dict(in_channels=_base_.channels),
)
train_dataloader = dict(batch_size=8)
