# 8 GPUs x 2 images
_base_ = [
    "../_base_/backbones/l.py",
    "_base_/models/mask2former.py",
    "_base_/datasets/ade20k_640.py",
    "_base_/schedules/mask2former_160k.py",
    "_base_/runtime_mask2former.py",
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(**_base_.backbone, drop_path_rate=0.5, with_cp=True),
    decode_head=dict(in_channels=_base_.channels),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.94))
train_cfg = dict(val_interval=2000)
