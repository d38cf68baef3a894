import flash_internimage.openmmlab  # noqa: F401  needed before mmdet can be imported
