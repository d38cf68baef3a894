# Base of all segmentors. Configs add the crop size, the backbone's size and drop_path_rate,
# and the channels of the heads.
model = dict(
    type="CheckedEncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(type="FlashInternImage"),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)
