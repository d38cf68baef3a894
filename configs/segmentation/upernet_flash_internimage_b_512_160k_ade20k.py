# 8 GPUs x 2 images
_base_ = "upernet_flash_internimage_s_512_160k_ade20k.py"
model = dict(
    backbone=dict(
        arch="base",
        with_cp=False,
        init_cfg=dict(checkpoint="flash_internimage_base.in1k"),
    ),
    decode_head=dict(in_channels=[112, 224, 448, 896]),
    auxiliary_head=dict(in_channels=448),
)
