# A demo that trains in about eleven minutes on one CPU core: a narrow model on small images.
_base_ = [
    "../_base_/backbones/nano.py",
    "_base_/models/upernet.py",
    "_base_/datasets/digits_scenes.py",
    "_base_/schedules/adamw_160k.py",
    "_base_/runtime.py",
]
# With ReLU, the last layer collapses (dead units) before the digits are separated.
head = dict(
    channels=32,
    num_classes=5,
    dropout_ratio=0.0,
    act_cfg=dict(type="LeakyReLU", negative_slope=0.1),
    loss_decode=dict(class_weight=[0.2] + [1.0] * 4),
)
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=_base_.backbone,
    decode_head=dict(in_channels=_base_.channels, **head),
    auxiliary_head=dict(in_channels=_base_.channels[2], **head),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=0, end=2400, eta_min=1e-6),
]
train_cfg = dict(max_iters=2400, val_interval=600)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=300))
