# InternImage-L, pretrained on ImageNet-22K.
backbone = dict(
    type="InternImage",
    arch="large",
    init_cfg=dict(type="Pretrained", checkpoint="internimage_large.in22k_384"),
)
channels = [160, 320, 640, 1280]  # of the four stages
