# DETR's augmentation in parts, for the pipelines of this folder: images at several scales, half of
# them cropped before.
resize = dict(
    type="RandomChoiceResize",
    scales=[(short, 1333) for short in range(480, 801, 32)],
    keep_ratio=True,
)
crop = dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600))
