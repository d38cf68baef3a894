_base_ = "mmdet::_base_/default_runtime.py"
custom_imports = dict(imports=["flash_internimage.openmmlab.detection"])
default_hooks = dict(
    checkpoint=dict(
        type="AtomicCheckpointHook", interval=1, max_keep_ckpts=1, save_best="auto", save_last=True
    )
)
# mmdet 3 no longer has it in every config: a head for other classes than the data's is an error
custom_hooks = [
    dict(type="NumClassCheckHook"),
    dict(type="CheckFiniteHook"),
    dict(type="CurvesHook"),
]
