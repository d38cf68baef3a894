# AdamW for 160,000 iterations, 16 images per update. The rate falls linearly to 0 from the first
# iteration on; during the warm-up it is a growing part of that. (In mmseg 1 it begins to fall after
# the warm-up. The engine's schedules reach their last value in iteration end - 1.)
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(layer_decay_rate=1.0, offset_lr_scale=1.0),
    optimizer=dict(type="AdamW", lr=6e-5, weight_decay=0.05),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1501),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160001),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=160000, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
auto_scale_lr = dict(enable=False, base_batch_size=16)
