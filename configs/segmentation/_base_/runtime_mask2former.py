_base_ = "runtime.py"
custom_hooks = [*_base_.custom_hooks, dict(type="FlashAttentionHook")]
