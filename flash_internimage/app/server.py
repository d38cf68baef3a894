"""Serve a page until the program is interrupted."""

import os
import signal
import sys
import threading

import gradio as gr

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
    page.launch(
        server_name=host,
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
        theme=THEME,
        css=CSS,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.stdout.write(f"Running on http://{_name(host)}:{port}; press Ctrl-C to stop\n")
        sys.stdout.flush()
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


def _name(host: str) -> str:
    if host in _ANY_ADDRESS:
        return "localhost"
    return f"[{host}]" if ":" in host else host


def _bypass_proxy(host: str) -> None:
    """Let gradio check its own server without the proxy that other requests use."""
    own = ",".join({"127.0.0.1", "localhost", host})
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), own]))
