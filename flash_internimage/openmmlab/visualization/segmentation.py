"""A visualizer of label maps."""

from typing import Any

import mmcv
import numpy as np
from mmengine.dist import master_only
from mmengine.registry import VISUALIZERS
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

from ...drawing import draw_label_map, side_by_side
from ...predictions import LabelMap
from ..datasets.label_maps import IGNORED


@VISUALIZERS.register_module()
class CaptionedSegVisualizer(SegLocalVisualizer):
    """SegLocalVisualizer with the pictures of :mod:`flash_internimage.drawing`.

    Ground truth and prediction have captions, small images are enlarged, and a legend lists the
    classes and their shares of the pixels. The palette of the dataset is not used, as most have
    colors that color-blind readers confuse. Depth maps are drawn by mmseg.

    Args:
        name: Name of the visualizer.
        alpha: Opacity of the colors, from 0 to 1.
        ignore_index: Label of pixels that are not annotated.
        **others: Arguments of SegLocalVisualizer.
    """

    def __init__(  # mmengine requires an argument with the name `name`
        self,
        name: str = "visualizer",
        alpha: float = 0.6,
        ignore_index: int = IGNORED,
        **others: Any,
    ) -> None:
        super().__init__(name=name, alpha=alpha, **others)
        self.ignore_index = ignore_index

    @master_only
    def add_datasample(
        self,
        name: str,
        image: np.ndarray,
        data_sample: SegDataSample | None = None,
        draw_gt: bool = True,
        draw_pred: bool = True,
        show: bool = False,
        wait_time: float = 0,
        out_file: str | None = None,
        step: int = 0,
        with_labels: bool | None = True,
        with_image: bool | None = False,
    ) -> None:
        """Draw label maps; see the method of SegLocalVisualizer.

        `with_labels` has no effect, as the legend names the classes.
        """
        fields = [] if data_sample is None else data_sample.keys()
        if data_sample is None or any("depth" in field for field in fields):
            super().add_datasample(
                name, image, data_sample, draw_gt, draw_pred, show, wait_time, out_file, step,
                with_labels, with_image,
            )  # fmt: skip
            return
        image = np.ascontiguousarray(image.clip(0, 255).astype(np.uint8))
        pictures = [image] if with_image else []
        if draw_gt and "gt_sem_seg" in data_sample:
            truth = data_sample.gt_sem_seg
            pictures.append(self._draw(image, truth, "Ground truth", self.ignore_index))
        if draw_pred and "pred_sem_seg" in data_sample:
            pictures.append(self._draw(image, data_sample.pred_sem_seg, "Prediction", None))
        drawn = side_by_side(pictures or [image])
        self.set_image(drawn)
        if show:
            self.show(drawn, win_name=name, wait_time=wait_time)
        if out_file is None:
            self.add_image(name, drawn, step)
        else:
            mmcv.imwrite(drawn[..., ::-1], out_file)

    def _draw(
        self, image: np.ndarray, label_map: PixelData, caption: str, ignore: int | None
    ) -> np.ndarray:
        labels = np.asarray(label_map.data.squeeze(0).cpu())
        result = LabelMap(labels, tuple(self.dataset_meta["classes"]))
        return draw_label_map(image, result, caption=caption, opacity=self.alpha, ignore=ignore)
