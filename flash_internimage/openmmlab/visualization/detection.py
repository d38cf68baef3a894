"""A visualizer of detections."""

import mmcv
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmdet.structures.mask import BitmapMasks, PolygonMasks, mask2bbox
from mmdet.visualization import DetLocalVisualizer
from mmengine.dist import master_only
from mmengine.registry import VISUALIZERS
from mmengine.structures import InstanceData

from ...drawing import draw_detections, side_by_side
from ...predictions import Detections


@VISUALIZERS.register_module()
class CaptionedDetVisualizer(DetLocalVisualizer):
    """DetLocalVisualizer with the pictures of :mod:`flash_internimage.drawing`.

    Annotations and predictions have captions, small images are enlarged, and labels do not cover
    objects. Panoptic and semantic segmentation are drawn by mmdet.
    """

    @master_only
    def add_datasample(
        self,
        name: str,
        image: np.ndarray,
        data_sample: DetDataSample | None = None,
        draw_gt: bool = True,
        draw_pred: bool = True,
        show: bool = False,
        wait_time: float = 0,
        out_file: str | None = None,
        pred_score_thr: float = 0.3,
        step: int = 0,
    ) -> None:
        """Draw annotations and predictions; see the method of DetLocalVisualizer."""
        fields = [] if data_sample is None else data_sample.keys()
        if data_sample is None or any("_seg" in field for field in fields):
            super().add_datasample(
                name, image, data_sample, draw_gt, draw_pred, show, wait_time, out_file,
                pred_score_thr, step,
            )  # fmt: skip
            return
        image = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
        classes = tuple(self.dataset_meta.get("classes") or ())
        pictures = []
        if draw_gt and "gt_instances" in data_sample:
            truth = _annotations(data_sample, classes)
            pictures.append(draw_detections(image, truth, caption="Ground truth"))
        if draw_pred and "pred_instances" in data_sample:
            predicted = data_sample.pred_instances
            predicted = predicted[predicted.scores > pred_score_thr]
            predicted = predicted[predicted.scores.argsort(descending=True)]
            prediction = to_detections(predicted, classes)
            pictures.append(draw_detections(image, prediction, caption="Prediction"))
        drawn = side_by_side(pictures or [image])
        self.set_image(drawn)
        if show:
            self.show(drawn, win_name=name, wait_time=wait_time)
        if out_file is None:
            self.add_image(name, drawn, step)
        else:
            mmcv.imwrite(drawn[..., ::-1], out_file)


def to_detections(instances: InstanceData, classes: tuple[str, ...]) -> Detections:
    """Convert instances of mmdet.

    Args:
        instances: Predictions or, without scores, annotations, in pixels of the image. Boxes that
            are all zero, as of models without a box head, are replaced by those of the masks.
        classes: Names of the classes.
    """
    instances = instances.cpu()
    boxes = get_box_tensor(instances.bboxes).float()
    masks = instances.get("masks")
    if isinstance(masks, (BitmapMasks, PolygonMasks)):
        masks = masks.to_tensor(bool, "cpu")
    if isinstance(masks, torch.Tensor) and not boxes.any():
        boxes = mask2bbox(masks.bool())
    scores = instances.get("scores")
    return Detections.of(
        boxes,
        instances.labels,
        classes,
        scores=None if scores is None else scores.float(),
        masks=masks,
    )


def _annotations(data_sample: DetDataSample, classes: tuple[str, ...]) -> Detections:
    """Return the annotations of an image, those that the metrics ignore as a class of their own."""
    truth = to_detections(data_sample.gt_instances, classes)
    if not len(data_sample.get("ignored_instances", ())):
        return truth
    ignored = to_detections(data_sample.ignored_instances, classes)
    with_masks = truth.masks is not None and ignored.masks is not None
    return Detections.of(
        np.concatenate([truth.boxes, ignored.boxes]),
        np.concatenate([truth.labels, np.full_like(ignored.labels, len(classes))]),
        (*classes, "ignored"),
        masks=np.concatenate([truth.masks, ignored.masks]) if with_masks else None,
    )
