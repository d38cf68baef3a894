# With a moving average of the weights.
_base_ = "runtime.py"
custom_hooks = [
    *_base_.custom_hooks,  # The published list replaced them, losing NumClassCheckHook.
    dict(
        type="EMAHook",
        ema_type="ExpMomentumEMA",
        momentum=1e-4,
        gamma=2000,
        update_buffers=True,  # averages the statistics of SyncBN, too
    ),
]
