# 8 GPUs x 2 images
_base_ = [
    "../_base_/backbones/internimage_s.py",
    "_base_/models/mask_rcnn.py",
    "_base_/datasets/coco_instance_crop.py",
    "_base_/schedules/adamw_3x.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(**_base_.backbone, drop_path_rate=0.3, with_cp=False),
    neck=dict(type="FPN", in_channels=_base_.channels),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
auto_scale_lr = dict(base_batch_size=16)
