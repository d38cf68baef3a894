# 8 GPUs x 2 images
_base_ = [
    "../_base_/backbones/internimage_xl.py",
    "_base_/models/upernet.py",
    "_base_/datasets/ade20k_640.py",
    "_base_/schedules/adamw_160k.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(**_base_.backbone, drop_path_rate=0.4),
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(layer_decay_rate=0.94),
    optimizer=dict(lr=2e-5),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
