# Cascade Mask R-CNN with box heads of four convolutions with SyncBN and one linear layer, trained
# with the GIoU loss. Configs add the backbone's size and drop_path_rate, and the channels of
# the neck; those of InternImage use mmdet's FPN.
_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"
model = dict(
    backbone=dict(_delete_=True, type="FlashInternImage", with_cp=True),
    neck=dict(_delete_=True, type="LayerNormFPN", out_channels=256, num_outs=5),
    roi_head=dict(
        bbox_head=[
            dict(
                type="ConvFCBBoxHead",
                num_shared_convs=4,
                num_shared_fcs=1,
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder",
                    target_means=[0.0, 0.0, 0.0, 0.0],
                    target_stds=[xy_std, xy_std, wh_std, wh_std],
                ),
                reg_class_agnostic=False,  # True in mmdet: one box for all classes
                reg_decoded_bbox=True,
                norm_cfg=dict(type="SyncBN", requires_grad=True),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
            )
            for xy_std, wh_std in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
        ]
    ),
)
