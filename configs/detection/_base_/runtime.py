_base_ = "mmdet::_base_/default_runtime.py"
custom_imports = dict(imports=["flash_internimage.openmmlab.detection"])
default_hooks = dict(
    checkpoint=dict(
        type="AtomicCheckpointHook", interval=1, max_keep_ckpts=1, save_best="auto", save_last=True
    )
)
visualizer = dict(
    type="CaptionedDetVisualizer",
    vis_backends=[dict(type="LocalVisBackend"), dict(type="RunTensorboardVisBackend")],
)
# NumClassCheckHook, no longer a default in mmdet 3, rejects heads whose number of classes is not
# that of the data.
custom_hooks = [
    dict(type="CheckDetectorHook"),
    dict(type="NumClassCheckHook"),
    dict(type="CheckFiniteHook"),
    dict(type="CurvesHook"),
]
