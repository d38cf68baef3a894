# A demo that two CPU cores train in about ten minutes: the real model, narrow, on small images.
_base_ = [
    "_base_/models/upernet.py",
    "_base_/datasets/digits_scenes.py",
    "_base_/schedules/adamw_160k.py",
    "_base_/runtime.py",
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(arch="nano"),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=64, num_classes=11),
    auxiliary_head=dict(in_channels=128, channels=64, num_classes=11),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=0, end=1500, eta_min=1e-6),
]
train_cfg = dict(max_iters=1500, val_interval=250)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=250))
