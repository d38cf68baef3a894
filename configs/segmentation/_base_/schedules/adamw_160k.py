# AdamW for 160,000 iterations, total batch size 16. The learning rate decays linearly to 0 from
# the first iteration on, and the warm-up is applied on top; in mmseg 1 the decay begins after the
# warm-up. mmengine's schedules reach their last value in iteration end - 1.
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="InternImageLayerDecayOptimizerConstructor",
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
