# Mask R-CNN with the heads of mmdet's R50-FPN. Configs add the backbone's size and
# drop_path_rate, and the channels of the neck; those of InternImage use mmdet's FPN.
_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
model = dict(
    backbone=dict(_delete_=True, type="FlashInternImage", with_cp=True),
    neck=dict(_delete_=True, type="LayerNormFPN", out_channels=256, num_outs=5),
)
