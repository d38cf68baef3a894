"""The page: its components, and what happens on a click."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from ..sampling import draw_sampling_points, list_layers
from .image_input import image_input
from .models import Models
from .presentation import LOWEST_SCORE, describe_error, present
from .uploads import read_upload

_logger = logging.getLogger(__name__)

# Requests at a time: one uses a model, the others read images, draw pictures or load models.
CONCURRENT = 4
# Requests that wait for these; further ones are refused.
WAITING = 100

# Fonts of the user's system: nothing is loaded from another host.
THEME = gr.themes.Default(
    font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
# Small images are enlarged, so that a pixel can be clicked.
CSS = "#image img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }"
_QUEUE: dict[str, Any] = {"concurrency_id": "models", "concurrency_limit": CONCURRENT}


class Actions:
    """Handlers of the page's buttons; thread-safe.

    Args:
        models: Models that can be chosen.
    """

    def __init__(self, models: Models) -> None:
        self._models = models

    def predict(
        self, model: str, path: str | None, threshold: float
    ) -> tuple[np.ndarray, str, dict, dict]:
        """Return a picture, a sentence, a table, and the choices of layers.

        Args:
            model: Label of the model.
            path: Uploaded image.
            threshold: Minimum score of the objects of a detector.
        """
        with _errors_shown():
            image = read_upload(_required(path))
            with self._models.use(model) as predictor:
                [result] = predictor([image])
                layers = _layer_choices(predictor.model, None)
            shown = present(image, result, threshold)
            table = {"headers": shown.headers, "data": shown.rows}
            return shown.picture, shown.summary, table, layers

    def sample(
        self,
        model: str,
        path: str | None,
        layer: str | None,
        depth: int,
        x: int | None,
        y: int | None,
    ) -> tuple[np.ndarray, str, dict]:
        """Return a picture of the sampling points, a sentence, and the choices of layers.

        Args:
            model: Label of the model.
            path: Uploaded image.
            layer: Name of the layer; None for the last of the third stage.
            depth: Number of layers whose points are composed.
            x: Column of the pixel.
            y: Row of the pixel.
        """
        with _errors_shown():
            image = read_upload(_required(path))
            if x is None or y is None:
                raise ValueError("Enter the coordinates of a pixel, or click it")
            with self._models.use(model) as predictor:
                layers = _layer_choices(predictor.model, layer)
                layer, depth = layers["value"], int(depth)
                height, width = image.shape[:2]
                x, y = x - (x == width), y - (y == height)  # A click on the edge is rounded up.
                picture = draw_sampling_points(predictor.model, image, layer, (x, y), depth)
            return picture, _layers_and_pixel(layer, depth, x, y), layers


def build_page(models: Models) -> gr.Blocks:
    """Return the page for a set of models."""
    actions = Actions(models)
    with gr.Blocks(
        title="FlashInternImage", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as page:
        gr.Markdown("# FlashInternImage")
        with gr.Row():
            with gr.Column():
                model = gr.Dropdown(
                    models.labels, value=models.labels[0], label="Model", elem_id="model"
                )
                image = image_input(label="Image", height=420, elem_id="image")
                threshold = gr.Slider(
                    LOWEST_SCORE, 1, 0.3, step=0.05, label="Minimum score of objects"
                )
                predict = gr.Button("Predict", variant="primary", elem_id="predict")
                table = gr.Dataframe(headers=["class", "score"], label="Details", interactive=False)
            with gr.Column():
                summary = _sentence("Result", "summary")
                picture = _picture("Prediction", "prediction")
        gr.Markdown("### Sampling points\nClick a pixel of the image, or enter its coordinates.")
        with gr.Row(equal_height=True):
            x = gr.Number(0, label="x", precision=0, minimum=0, elem_id="x")
            y = gr.Number(0, label="y", precision=0, minimum=0, elem_id="y")
            layer = gr.Dropdown([], label="Layer", scale=2)
            depth = gr.Slider(1, 4, 1, step=1, label="Layers to compose")
            sample = gr.Button("Show sampling points")
        points_summary = _sentence("Layer and pixel", "points-summary")
        points = _picture("Sampling points", "points")
        predict.click(
            actions.predict, [model, image, threshold], [picture, summary, table, layer],
            api_name="predict", **_QUEUE,
        )  # fmt: skip
        inputs, outputs = [model, image, layer, depth, x, y], [points, points_summary, layer]
        sample.click(actions.sample, inputs, outputs, api_name="sample", **_QUEUE)
        image.select(_pixel, None, [x, y], queue=False, api_visibility="private").then(
            actions.sample, inputs, outputs, api_visibility="private", **_QUEUE
        )
    return page.queue(max_size=WAITING)


def _pixel(event: gr.SelectData) -> tuple[int, int]:
    x, y = event.index
    return x, y


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        interactive=False,
        format="png",
        buttons=["download", "fullscreen"],  # not that which publishes on the Hugging Face Hub
        elem_id=name,
    )


def _sentence(label: str, name: str) -> gr.Textbox:
    return gr.Textbox(label=label, interactive=False, elem_id=name)


def _layer_choices(network: Any, layer: str | None) -> dict:
    """Return the layers as an update of the dropdown, with `layer` or a default as value."""
    names = list_layers(network)
    if layer not in names:
        third_stage = [name for name in names if re.search(r"\blevels\.2\.", name)]
        layer = (third_stage or names)[-1]
    return gr.update(choices=names, value=layer)


def _layers_and_pixel(layer: str, depth: int, x: int, y: int) -> str:
    below = f" and {depth - 1} below" if depth > 1 else ""
    return f"{layer}{below}, pixel ({x}, {y})"


def _required(path: str | None) -> str:
    if path is None:
        raise ValueError("Choose an image first")
    return path


@contextmanager
def _errors_shown() -> Iterator[None]:
    """Show errors that have a message for users, until they close it."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        text = describe_error(error)
        _logger.warning("%s", text)
        message = escape(text, quote=False)
        raise gr.Error(message, duration=None, print_exception=False) from error
