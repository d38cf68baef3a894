# 8 GPUs x 4 images
_base_ = [
    "_base_/models/dino.py",
    "_base_/datasets/coco_detection_crop.py",
    "_base_/schedules/dino_1x.py",
    "_base_/runtime_dino.py",
]
model = dict(
    backbone=dict(
        arch="tiny",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="flash_internimage_tiny.in1k"),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
train_dataloader = dict(batch_size=4)
