# 16 GPUs x 1 image
_base_ = [
    "../_base_/backbones/internimage_h.py",
    "_base_/models/upernet.py",
    "_base_/datasets/ade20k_896.py",
    "_base_/schedules/adamw_160k.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(**_base_.backbone, drop_path_rate=0.5, with_cp=True),
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
train_dataloader = dict(batch_size=1)
optim_wrapper = dict(
    paramwise_cfg=dict(layer_decay_rate=0.95),
    optimizer=dict(lr=2e-5),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
