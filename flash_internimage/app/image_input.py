"""The component that takes images."""

from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like


def image_input(**options: Any) -> gr.Image:
    """Return an image component whose value is the path of the uploaded file.

    gr.Image itself decodes the file, and reports a damaged one by the name of a temporary file. It
    also accepts a URL from which the server downloads a file of any size.

    Args:
        **options: Further options of gr.Image.
    """
    image = gr.Image(
        type="filepath",
        sources=["upload", "webcam", "clipboard"],
        buttons=["fullscreen"],
        **options,
    )
    cache = image.async_move_resource_to_block_cache

    async def cache_upload(path: Any) -> str | None:
        if path is not None and is_http_url_like(str(path)):
            raise gr.Error("Image must be uploaded, got a URL", print_exception=False)
        return await cache(path)

    # Attributes instead of a subclass, for which gradio would write a stub into this package.
    for name, replacement in {
        "async_move_resource_to_block_cache": cache_upload,
        "preprocess": lambda payload: payload.path if payload else None,
    }.items():
        setattr(image, name, replacement)
    return image
