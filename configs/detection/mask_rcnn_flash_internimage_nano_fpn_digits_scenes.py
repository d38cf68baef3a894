# A demo that trains in about twelve minutes on two CPU cores: a narrow model on small images.
_base_ = [
    "../_base_/backbones/nano.py",
    "_base_/models/mask_rcnn.py",
    "_base_/datasets/digits_scenes.py",
    "_base_/schedules/adamw_1x.py",
    "_base_/runtime.py",
]
model = dict(
    backbone=dict(**_base_.backbone, with_cp=False),
    neck=dict(in_channels=_base_.channels, out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=10),
        mask_roi_extractor=dict(out_channels=64, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=10),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(sampler=dict(num=24)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)
train_cfg = dict(max_epochs=20, val_interval=10)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(
        type="CosineAnnealingLR",
        by_epoch=True,
        begin=0,
        end=20,
        eta_min=1e-6,
        convert_to_iter_based=True,
    ),
]
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1.0))
default_hooks = dict(logger=dict(interval=10))
