# InternImage-XL, pretrained on ImageNet-22K.
backbone = dict(
    type="InternImage",
    arch="xlarge",
    init_cfg=dict(type="Pretrained", checkpoint="internimage_xlarge.in22k_384"),
)
channels = [192, 384, 768, 1536]  # of the four stages
