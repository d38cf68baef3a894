# InternImage-T, pretrained on ImageNet-1K.
backbone = dict(
    type="InternImage",
    arch="tiny",
    init_cfg=dict(type="Pretrained", checkpoint="internimage_tiny.in1k"),
)
channels = [64, 128, 256, 512]  # of the four stages
