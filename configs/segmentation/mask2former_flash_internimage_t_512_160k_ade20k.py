# 8 GPUs x 2 images
_base_ = [
    "../_base_/backbones/t.py",
    "_base_/models/mask2former.py",
    "_base_/datasets/ade20k_512.py",
    "_base_/schedules/mask2former_160k.py",
    "_base_/runtime_mask2former.py",
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(**_base_.backbone, drop_path_rate=0.2),
    decode_head=dict(
        in_channels=_base_.channels,
        num_queries=100,
        pixel_decoder=dict(encoder=dict(layer_cfg=dict(ffn_cfg=dict(feedforward_channels=1024)))),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9), clip_grad=dict(max_norm=0.01))
