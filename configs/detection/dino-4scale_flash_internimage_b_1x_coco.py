# 8 GPUs x 4 images
_base_ = [
    "../_base_/backbones/b.py",
    "_base_/models/dino.py",
    "_base_/datasets/coco_detection_crop.py",
    "_base_/schedules/dino_1x.py",
    "_base_/runtime_dino.py",
]
model = dict(
    backbone=dict(**_base_.backbone, drop_path_rate=0.3),
    neck=dict(in_channels=_base_.channels[1:]),
)
train_dataloader = dict(batch_size=4)
