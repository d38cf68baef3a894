# 16 GPUs x 4 images
_base_ = [
    "_base_/models/mask_rcnn.py",
    "_base_/datasets/coco_instance_crop.py",
    "_base_/schedules/adamw_3x.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(
        arch="base",
        drop_path_rate=0.4,
        init_cfg=dict(type="Pretrained", checkpoint="flash_internimage_base.in1k"),
    ),
    neck=dict(in_channels=[112, 224, 448, 896]),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9, offset_lr_scale=0.01))
