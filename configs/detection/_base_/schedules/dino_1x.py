# AdamW for 12 epochs, total batch size 32. Unlike mmdet's DINO, it has a warm-up and layer-wise
# learning rate decay.
_base_ = "adamw_1x.py"
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=12, milestones=[11], gamma=0.1),
]
optim_wrapper = dict(
    paramwise_cfg=dict(layer_decay_rate=0.9),
    optimizer=dict(lr=2e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
auto_scale_lr = dict(base_batch_size=32)
