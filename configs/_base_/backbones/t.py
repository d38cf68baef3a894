# FlashInternImage-T, pretrained on ImageNet-1K.
backbone = dict(
    arch="tiny",
    init_cfg=dict(type="Pretrained", checkpoint="flash_internimage_tiny.in1k"),
)
channels = [64, 128, 256, 512]  # of the four stages
