# tools/make_demo_data.py digits-scenes-ade20k: 400 and 60 photographs with handwritten digits on
# them, laid out and labelled as ADE20K is.
data_root = "data/digits-scenes-ade20k/"
dataset_type = "CheckedSegDataset"
metainfo = dict(classes=("background", *"0123456789"))
crop_size = (128, 128)
train_pipeline = [
    dict(type="LoadReadableImage"),
    dict(type="LoadCheckedAnnotations"),
    dict(type="RandomResize", scale=(160, 160), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.95),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32),
    dict(type="LoadCheckedAnnotations"),
    dict(type="PackSegInputs"),
]
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [
                dict(type="Resize", scale=(int(160 * ratio),) * 2, keep_ratio=True)
                for ratio in (0.75, 1.0, 1.25)
            ],
            [dict(type="ResizeToMultiple", size_divisor=32)],
            [dict(type="LoadCheckedAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,  # two cores are busy with the model
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        metainfo=metainfo,
        reduce_zero_label=True,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        metainfo=metainfo,
        reduce_zero_label=True,
        pipeline=test_pipeline,
        test_mode=True,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
tta_model = dict(type="SegTTAModel")
