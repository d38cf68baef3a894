# 16 GPUs x 4 images
_base_ = "mask_rcnn_flash_internimage_t_fpn_3x_coco.py"
model = dict(
    backbone=dict(
        arch="base",
        drop_path_rate=0.4,
        init_cfg=dict(checkpoint="flash_internimage_base.in1k"),
    ),
    neck=dict(in_channels=[112, 224, 448, 896]),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    paramwise_cfg=dict(layer_decay_rate=0.9, offset_lr_scale=0.01), optimizer=dict(lr=2e-4)
)
