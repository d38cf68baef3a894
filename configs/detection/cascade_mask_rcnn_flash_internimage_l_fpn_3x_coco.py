# 16 GPUs x 4 images
_base_ = [
    "../_base_/backbones/l.py",
    "_base_/models/cascade_mask_rcnn.py",
    "_base_/datasets/coco_instance_crop.py",
    "_base_/schedules/adamw_3x.py",
    "_base_/runtime_ema.py",
]
model = dict(
    backbone=dict(**_base_.backbone, drop_path_rate=0.4),
    neck=dict(in_channels=_base_.channels),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9, offset_lr_scale=0.01))
