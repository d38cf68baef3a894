# 8 GPUs x 2 images
_base_ = "mask2former_flash_internimage_s_640_160k_ade20k.py"
model = dict(
    backbone=dict(
        arch="base",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="flash_internimage_base.in1k"),
    ),
    decode_head=dict(in_channels=[112, 224, 448, 896]),
)
