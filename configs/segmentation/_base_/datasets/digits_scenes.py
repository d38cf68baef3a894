# 800 training and 100 validation images: handwritten digits on crops of photographs, in the layout
# and with the labels of ADE20K, written by `flash-internimage demo-data digits-scenes-ade20k`.
_base_ = "ade20k_512.py"
crop_size = (128, 128)
train_pipeline = [
    dict(type="LoadReadableImage"),
    dict(type="LoadCheckedAnnotations"),
    dict(type="RandomResize", scale=(160, 160), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.95),
    dict(type="PackSegInputs"),
]
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (160, 160)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type="Resize", scale=(side, side), keep_ratio=True) for side in (128, 160, 192)
]
tta_pipeline[1].transforms[2] = [dict(type="RandomFlip", prob=0.0)]  # Digits cannot be flipped.
loader = dict(num_workers=0, persistent_workers=False)  # two cores are busy with the model
dataset = dict(
    type="CheckedSegDataset",
    data_root="data/digits-scenes-ade20k/",
    metainfo=dict(classes=("background", *"0147")),
    reduce_zero_label=True,
)
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline, **dataset), **loader)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **dataset), **loader)
test_dataloader = val_dataloader
