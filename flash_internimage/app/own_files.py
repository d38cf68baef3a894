"""Keep the server from fetching files of other hosts for its users."""

from gradio_client.utils import is_http_url_like
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class OwnFilesOnly:
    """Refuse gradio's routes that download a URL and pass it on.

    Args:
        app: The application behind this middleware.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let the application do it."""
        _, separator, target = scope.get("path", "").partition("/gradio_api/file=")
        if separator and is_http_url_like(target):
            response = PlainTextResponse("only files of this page are served", status_code=403)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)
