# 8 GPUs x 4 images
_base_ = "dino-4scale_flash_internimage_t_1x_coco.py"
model = dict(
    backbone=dict(
        arch="small",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="flash_internimage_small.in1k"),
    ),
    neck=dict(in_channels=[160, 320, 640]),
)
