# 8 GPUs x 2 images
_base_ = "mask_rcnn_flash_internimage_t_fpn_1x_coco.py"
model = dict(
    backbone=dict(
        arch="small",
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint="flash_internimage_small.in1k"),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
