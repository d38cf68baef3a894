# InternImage-H, pretrained on 427 million images and ImageNet-22K.
backbone = dict(
    type="InternImage",
    arch="huge",
    init_cfg=dict(type="Pretrained", checkpoint="internimage_huge.joint_in22k_384"),
)
channels = [320, 640, 1280, 2560]  # of the four stages
