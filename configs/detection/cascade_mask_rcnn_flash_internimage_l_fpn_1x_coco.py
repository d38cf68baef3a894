# 8 GPUs x 2 images
_base_ = [
    "_base_/models/cascade_mask_rcnn.py",
    "_base_/datasets/coco_instance.py",
    "_base_/schedules/adamw_1x.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(
        arch="large",
        drop_path_rate=0.4,
        with_cp=False,
        init_cfg=dict(type="Pretrained", checkpoint="flash_internimage_large.in22k_384"),
    ),
    neck=dict(in_channels=[160, 320, 640, 1280]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.94))
