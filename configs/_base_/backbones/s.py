# FlashInternImage-S, pretrained on ImageNet-1K.
backbone = dict(
    arch="small",
    init_cfg=dict(type="Pretrained", checkpoint="flash_internimage_small.in1k"),
)
channels = [80, 160, 320, 640]  # of the four stages
