# 8 GPUs x 2 images
_base_ = [
    "../_base_/backbones/internimage_t.py",
    "_base_/models/dino.py",
    "_base_/datasets/coco_detection_crop.py",
    "_base_/schedules/dino_1x.py",
    "_base_/runtime_dino.py",
]
model = dict(
    backbone=dict(**_base_.backbone, drop_path_rate=0.2),
    neck=dict(in_channels=_base_.channels[1:]),
    test_cfg=dict(max_per_img=100),  # 300 in all other configs
)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
auto_scale_lr = dict(base_batch_size=16)
