"""Serve a page until the program is interrupted."""

import os
import signal
import sys
import threading

import gradio as gr
from starlette.middleware import Middleware

from .own_files import OwnFilesOnly
from .page import CSS, THEME

_ANY_ADDRESS = ("0.0.0.0", "::")


def serve(page: gr.Blocks, host: str, port: int, max_megabytes: int) -> None:
    """Serve a page until Ctrl-C or SIGTERM.

    Args:
        page: The page.
        host: Address of this machine.
        port: Number of a free port.
        max_megabytes: Maximum size of an uploaded file.

    Raises:
        OSError: If the port is no longer free.
    """
    _bypass_proxy(host)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        page.launch(
            server_name=_in_url(host),
            server_port=port,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            allowed_paths=[],
            max_file_size=max_megabytes * 2**20,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(OwnFilesOnly)]},
            theme=THEME,
            css=CSS,
        )
        name = "localhost" if host in _ANY_ADDRESS else _in_url(host)
        sys.stdout.write(f"Running on http://{name}:{port}; press Ctrl-C to stop\n")
        sys.stdout.flush()
        threading.Event().wait()
    except KeyboardInterrupt:
        return
    finally:
        page.close(verbose=False)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bypass_proxy(host: str) -> None:
    """Let gradio check its own server without the proxy that other requests use."""
    own = ",".join({"127.0.0.1", "localhost", host})
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), own]))
