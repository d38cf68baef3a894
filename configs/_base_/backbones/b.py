# FlashInternImage-B, pretrained on ImageNet-1K.
backbone = dict(
    arch="base",
    init_cfg=dict(type="Pretrained", checkpoint="flash_internimage_base.in1k"),
)
channels = [112, 224, 448, 896]  # of the four stages
