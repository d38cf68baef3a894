# 8 GPUs x 2 images
_base_ = [
    "../_base_/backbones/internimage_l.py",
    "_base_/models/dino.py",
    "_base_/datasets/coco_detection_crop.py",
    "_base_/schedules/dino_1x.py",
    "_base_/runtime_dino.py",
]
model = dict(
    backbone=dict(**_base_.backbone, drop_path_rate=0.4),
    neck=dict(in_channels=_base_.channels[1:]),
)
# No layer-wise learning rate decay, and weight decay for norms and biases, too.
optim_wrapper = dict(
    constructor="DefaultOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, custom_keys={"backbone": dict(lr_mult=0.1)}),
    optimizer=dict(lr=1e-4, weight_decay=0.05),
)
auto_scale_lr = dict(base_batch_size=16)
