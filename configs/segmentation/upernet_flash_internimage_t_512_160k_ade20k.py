# 8 GPUs x 2 images
_base_ = [
    "../_base_/backbones/t.py",
    "_base_/models/upernet.py",
    "_base_/datasets/ade20k_512.py",
    "_base_/schedules/adamw_160k.py",
    "_base_/runtime.py",
]
# Published without ResizeToMultiple, unlike all other segmentors.
test_pipeline = _base_.test_pipeline
del test_pipeline[2]
tta_pipeline = _base_.tta_pipeline
del tta_pipeline[1].transforms[1]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(**_base_.backbone, drop_path_rate=0.2, with_cp=True),
    decode_head=dict(in_channels=_base_.channels),
    auxiliary_head=dict(in_channels=_base_.channels[2]),
)
