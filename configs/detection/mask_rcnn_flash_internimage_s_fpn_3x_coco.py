# 8 GPUs x 8 images
_base_ = "mask_rcnn_flash_internimage_t_fpn_3x_coco.py"
model = dict(
    backbone=dict(
        arch="small",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="flash_internimage_small.in1k"),
    ),
    neck=dict(in_channels=[80, 160, 320, 640]),
)
train_dataloader = dict(batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
