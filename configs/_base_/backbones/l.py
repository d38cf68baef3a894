# FlashInternImage-L, pretrained on ImageNet-22K.
backbone = dict(
    arch="large",
    init_cfg=dict(type="Pretrained", checkpoint="flash_internimage_large.in22k_384"),
)
channels = [160, 320, 640, 1280]  # of the four stages
