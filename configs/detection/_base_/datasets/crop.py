# Transforms of DETR's augmentation, for the pipelines in this folder: images are resized to several
# scales, half of them after a crop.
resize = dict(
    type="RandomChoiceResize",
    scales=[(short, 1333) for short in range(480, 801, 32)],
    keep_ratio=True,
)
crop = dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600))
