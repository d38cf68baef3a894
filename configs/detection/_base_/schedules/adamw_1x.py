# AdamW for 12 epochs, total batch size 16: 500 iterations of warm-up, steps at epochs 8 and 11.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    constructor="InternImageLayerDecayOptimizerConstructor",
    paramwise_cfg=dict(layer_decay_rate=1.0, offset_lr_scale=1.0),
    optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
)
