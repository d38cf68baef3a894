# 16 GPUs x 1 image
# The published training started from the authors' model for COCO-Stuff 164k: set load_from to it.
_base_ = [
    "../_base_/backbones/internimage_h.py",
    "_base_/models/mask2former.py",
    "_base_/datasets/ade20k_896.py",
    "_base_/schedules/mask2former_160k.py",
    "_base_/runtime_mask2former.py",
]
attention = dict(embed_dims=1024, num_heads=32)
ffn = dict(embed_dims=1024, feedforward_channels=4096)
encoding = dict(num_feats=512)
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(**_base_.backbone, drop_path_rate=0.5, with_cp=True),
    decode_head=dict(
        in_channels=_base_.channels,
        feat_channels=1024,
        out_channels=1024,
        pixel_decoder=dict(
            encoder=dict(layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=ffn)),
            positional_encoding=encoding,
        ),
        positional_encoding=encoding,
        transformer_decoder=dict(
            layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn)
        ),
    ),
)
train_dataloader = dict(batch_size=1)
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type="Resize", scale=(4 * side, side), keep_ratio=True)
    for side in (768, 832, 896, 960, 1024)
]
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.95), optimizer=dict(lr=1e-5))
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = 80001
train_cfg = dict(max_iters=80000)
