# 8 GPUs x 2 images
_base_ = "dino-4scale_flash_internimage_t_1x_coco.py"
model = dict(
    backbone=dict(
        arch="large",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="flash_internimage_large.in22k_384"),
    ),
    neck=dict(in_channels=[320, 640, 1280]),
)
train_dataloader = dict(batch_size=2)
# No layer-wise learning rate decay, and weight decay for norms and biases, too.
optim_wrapper = dict(
    constructor="DefaultOptimWrapperConstructor",
    paramwise_cfg=dict(_delete_=True, custom_keys={"backbone": dict(lr_mult=0.1)}),
    optimizer=dict(lr=1e-4, weight_decay=0.05),
)
auto_scale_lr = dict(base_batch_size=16)
