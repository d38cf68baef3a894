custom_imports = dict(imports=["flash_internimage.openmmlab.segmentation"])
default_scope = "mmseg"
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(
    type="CaptionedSegVisualizer",
    vis_backends=[dict(type="LocalVisBackend"), dict(type="RunTensorboardVisBackend")],
    name="visualizer",
)
log_processor = dict(by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="AtomicCheckpointHook",
        by_epoch=False,
        interval=1000,
        max_keep_ckpts=1,
        save_best="mIoU",
        save_last=True,
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
custom_hooks = [
    dict(type="CheckSegmentorHook"),
    dict(type="CheckFiniteHook"),
    dict(type="CurvesHook"),
]
