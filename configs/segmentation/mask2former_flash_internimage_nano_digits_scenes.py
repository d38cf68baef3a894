# A narrow Mask2Former with few layers on the data of the UPerNet demo.
_base_ = [
    "../_base_/backbones/nano.py",
    "_base_/models/mask2former.py",
    "_base_/datasets/digits_scenes.py",
    "_base_/schedules/mask2former_160k.py",
    "_base_/runtime_mask2former.py",
]
attention = dict(embed_dims=64, num_heads=4)
ffn = dict(ffn_cfg=dict(embed_dims=64, feedforward_channels=128))
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=_base_.backbone,
    decode_head=dict(
        in_channels=_base_.channels,
        feat_channels=64,
        out_channels=64,
        num_classes=5,
        num_queries=20,
        pixel_decoder=dict(
            encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, **ffn)),
            positional_encoding=dict(num_feats=32),
        ),
        positional_encoding=dict(num_feats=32),
        transformer_decoder=dict(
            num_layers=3,
            layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, **ffn),
        ),
        loss_cls=dict(class_weight=[1.0] * 5 + [0.1]),
        train_cfg=dict(num_points=2048),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=0, end=1500, eta_min=1e-6),
]
train_cfg = dict(max_iters=1500, val_interval=250)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=250))
