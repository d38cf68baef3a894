# InternImage-S, pretrained on ImageNet-1K.
backbone = dict(
    type="InternImage",
    arch="small",
    init_cfg=dict(type="Pretrained", checkpoint="internimage_small.in1k"),
)
channels = [80, 160, 320, 640]  # of the four stages
