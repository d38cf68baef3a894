# A narrow DINO with few layers on the demo data. DETR-like detectors converge slowly: in 30 epochs,
# it reaches half the AP of the Mask R-CNN.
_base_ = [
    "../_base_/backbones/nano.py",
    "_base_/models/dino.py",
    "_base_/datasets/digits_scenes.py",
    "_base_/schedules/dino_1x.py",
    "_base_/runtime_dino.py",
]
attention = dict(embed_dims=128)
layers = dict(self_attn_cfg=attention, ffn_cfg=dict(embed_dims=128, feedforward_channels=256))
model = dict(
    num_queries=50,
    backbone=dict(**_base_.backbone, with_cp=False),
    neck=dict(in_channels=_base_.channels[1:], out_channels=128),
    encoder=dict(num_layers=2, layer_cfg=layers),
    decoder=dict(num_layers=2, layer_cfg=dict(**layers, cross_attn_cfg=attention)),
    positional_encoding=dict(num_feats=64),
    bbox_head=dict(embed_dims=128, num_classes=10),
    dn_cfg=dict(group_cfg=dict(num_dn_queries=20)),
    test_cfg=dict(max_per_img=50),
)
train_cfg = dict(max_epochs=30, val_interval=5)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=30, milestones=[25], gamma=0.1),
]
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=1.0), optimizer=dict(lr=5e-4))
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
default_hooks = dict(logger=dict(interval=10))
