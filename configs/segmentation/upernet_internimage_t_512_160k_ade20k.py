# 8 GPUs x 2 images
_base_ = [
    "../_base_/backbones/internimage_t.py",
    "_base_/models/upernet.py",
    "_base_/datasets/ade20k_512.py",
    "_base_/schedules/adamw_160k.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(**_base_.backbone, drop_path_rate=0.2, with_cp=True),
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
