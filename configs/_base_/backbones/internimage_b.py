# InternImage-B, pretrained on ImageNet-1K.
backbone = dict(
    type="InternImage",
    arch="base",
    init_cfg=dict(type="Pretrained", checkpoint="internimage_base.in1k"),
)
channels = [112, 224, 448, 896]  # of the four stages
