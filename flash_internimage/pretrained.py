# Written by `python -m tools.zoo generate` from configs/zoo.yaml.
"""The released classifiers by their timm names: address, resolution, classes."""

RELEASED = {
    "flash_internimage_tiny.in1k": (
        "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_t_1k_224.pth",
        224,
        1000,
    ),
    "flash_internimage_small.in1k": (
        "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_s_1k_224.pth",
        224,
        1000,
    ),
    "flash_internimage_base.in1k": (
        "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_b_1k_224.pth",
        224,
        1000,
    ),
    "flash_internimage_large.in22k_ft_in1k_384": (
        "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_internimage_l_22kto1k_384.pth",
        384,
        1000,
    ),
    "flash_internimage_large.in22k_384": (
        "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_l_22k_384.pth",
        384,
        21841,
    ),
}
