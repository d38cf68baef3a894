# Unlike in the published detectors and UPerNets, the embeddings of the head have the learning rate
# of the first layer of the backbone.
_base_ = "adamw_160k.py"
optim_wrapper = dict(
    paramwise_cfg=dict(
        first_layer=[
            "decode_head.mask_embed",
            "decode_head.cls_embed",
            "decode_head.level_embed",
            "decode_head.query_embed",
            "decode_head.query_feat",
        ]
    ),
    optimizer=dict(lr=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
)
train_cfg = dict(val_interval=5000)
