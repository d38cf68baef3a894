# 8 GPUs x 2 images
_base_ = "mask2former_flash_internimage_s_640_160k_ade20k.py"
model = dict(
    backbone=dict(
        arch="large",
        drop_path_rate=0.5,
        with_cp=True,
        init_cfg=dict(checkpoint="flash_internimage_large.in22k_384"),
    ),
    decode_head=dict(in_channels=[160, 320, 640, 1280]),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.94))
train_cfg = dict(val_interval=2000)
