# ADE20K with crops of 896 x 896; all sizes are 1.75 times those of ade20k_512.py.
_base_ = "ade20k_512.py"
crop_size = (896, 896)
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (3584, 896)
train_pipeline[3].crop_size = crop_size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (3584, 896)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type="Resize", scale=(int(3584 * ratio), int(896 * ratio)), keep_ratio=True)
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
