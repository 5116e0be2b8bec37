"""Serves the page, on this machine alone by default, without a request to any other."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NoReturn

from tokenflow.app.request import UPLOADS, Requests
from tokenflow.app.serving import LOCAL, Serving
from tokenflow.errors import InputError
from tokenflow.storage.paths import local

ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|login|logout|robots\.txt)/?"
    r"|/(assets|static|svelte)/.*"
    r"|/gradio_api/(queue/(join|data)|upload|upload_progress|heartbeat/\w+|startup-events|app_id"
    r"|user|login_check|token|theme\.css|cancel|reset|file=/.*)/?"
)
"""Of Gradio's, what the page needs: no addresses that are fetched, no other ways to call."""
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; frame-ancestors 'none'"
)
"""What the browser may load: nothing from anywhere else."""
STYLE = Path(__file__).parent / "style.css"
FETCHING = ("async_ssrf_protected_download", "ssrf_protected_download", "save_url_to_cache")
"""Gradio's functions that fetch what is given in place of an uploaded file, by its address."""
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer"))


class Only:
    """An ASGI application of which only `ROUTES` are there, with `POLICY`, under known hosts.

    Args:
        app: The whole application.
        hosts: What requests may call this server; whatever they like if empty.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...] = ()) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self.admits(scope):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(b"content-security-policy", POLICY.encode()), *HEADERS]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        await self.app(scope, receive, with_policy)

    def admits(self, scope: Any) -> bool:
        """Whether a request is for the page, and not sent by another site's page."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin", "")
        named = re.sub(r":\d+$", "", host).strip("[]")
        known = not self.hosts or named in self.hosts
        own = not (origin and self.hosts) or origin.partition("://")[2] == host
        reading = scope["method"] in ("GET", "HEAD")
        ours = reading or (own and headers.get(b"sec-fetch-site") != "cross-site")
        return known and ours and ROUTES.fullmatch(scope["path"]) is not None


def refused(url: str, *_: Any, **__: Any) -> NoReturn:
    """In place of `FETCHING`."""
    raise InputError(f"expected a file that is uploaded, got the address {url!r:.200}")


def serve(serving: Serving, block: bool = True) -> Any:
    """Builds the page and serves it, until the process is ended or, without `block`, in a thread.

    Returns Gradio's blocks, whose `local_url` is the page's address.

    Raises:
        InputError: Gradio is not installed, or the folder or the port cannot be used.
    """
    uploads = local(serving.folder).absolute() / UPLOADS
    try:
        uploads.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{uploads} cannot be written ({error}); choose another --folder"
        ) from error
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # Gradio's own way to be told where
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError as error:
        raise InputError(
            f"tokenflow app needs Gradio ({error}); install it by pip install 'tokenflow[app]'"
        ) from error
    from PIL import EpsImagePlugin
    from starlette.middleware import Middleware  # comes with Gradio

    from tokenflow.app.page import Page

    EpsImagePlugin.gs_binary = False  # else a picture that is uploaded could start Ghostscript
    for name in FETCHING:
        setattr(gr.processing_utils, name, refused)
    page = Page(Requests(serving))
    blocks = page.build()
    blocks.queue(api_open=False)
    local_only = not serving.share and serving.host in LOCAL
    try:
        blocks.launch(
            server_name=serving.host,
            server_port=serving.port,
            share=serving.share,
            auth=serving.admits if serving.password else None,
            inbrowser=serving.open,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            max_file_size=f"{serving.upload_megabytes}mb",
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css_paths=STYLE,
            app_kwargs={"middleware": [Middleware(Only, hosts=LOCAL if local_only else ())]},
        )
    except OSError as error:  # the port is taken
        raise InputError(f"the page cannot be served: {error}; choose another --port") from error
    print(f"the page is at {blocks.share_url or blocks.local_url}", flush=True)
    if block:
        try:
            blocks.block_thread()
        finally:
            page.device.close()
    return blocks
