# 8 GPUs x 2 images
_base_ = "upernet_flash_internimage_s_512_160k_ade20k.py"
# Published without ResizeToMultiple, unlike all other segmentors.
test_pipeline = _base_.test_pipeline
del test_pipeline[2]
tta_pipeline = _base_.tta_pipeline
del tta_pipeline[1].transforms[1]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    backbone=dict(
        arch="tiny",
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint="flash_internimage_tiny.in1k"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
