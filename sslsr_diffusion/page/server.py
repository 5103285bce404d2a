"""The page's server: on this machine alone, one job at a time; its folder is deleted when it ends."""

import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sslsr_diffusion.errors import MissingDependency, UserError
from sslsr_diffusion.page.bench import Bench
from sslsr_diffusion.page.shelf import ADDRESS, Shelf

HOST = "127.0.0.1"
COVERED = "#said .translucent { background: var(--block-background-fill); }"  # old words do not stand behind the bar of progress
# a browser that obeys this asks nobody but us, whatever the scripts of gradio or of an uploaded picture want, and shows us in no other page
ALLOWED = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)


def serve(
    models: Sequence[str], *, port: int, runs: Path, where: dict[str, Any], on_ready: Callable[[str], object] = lambda address: None
) -> None:
    """Serve the page until SIGINT or SIGTERM; `where` goes to `open_model`, `on_ready` gets the address.
    Raises UserError: the port cannot be had; MissingDependency: gradio is not installed.
    """
    check_gradio()
    import uvicorn

    with _listen(port) as listening, tempfile.TemporaryDirectory(prefix="sslsr-page-") as folder:
        shelf, bench = Shelf(Path(folder)), Bench(where)
        app = application(bench, shelf, models, runs)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1))
        on_ready(f"http://{HOST}:{listening.getsockname()[1]}")
        try:
            server.run(sockets=[listening])
        finally:
            bench.stop()


def application(bench: Bench, shelf: Shelf, models: Sequence[str], runs: Path) -> Any:
    """The ASGI application: gradio's, the views, and the guard around both."""
    import gradio
    from fastapi import FastAPI
    from starlette.staticfiles import StaticFiles

    from sslsr_diffusion.page.app import App

    for folder in (shelf.views, shelf.uploads):
        folder.mkdir(exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(shelf.uploads)
    site = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    site.mount(ADDRESS, StaticFiles(directory=shelf.views, html=True))
    font = ["system-ui", "sans-serif"]
    looks = gradio.themes.Default(font=font, font_mono=["monospace"])
    blocks = App(bench, shelf, models, runs).build()
    more: dict[str, Any] = {"ssr_mode": False, "run_history": False, "footer_links": [], "show_error": True}
    mounted = gradio.mount_gradio_app(site, blocks, "/", server_name=HOST, theme=looks, css=COVERED, **more)
    return Guard(mounted)


Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


class Guard:
    """ASGI: refuses what other sites' pages ask of us through a browser here, and tells the browser to ask nobody else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        names = [f"//{headers.get(b'host', '')}", headers.get(b"origin", "//")]
        if any(urlsplit(name).hostname not in (HOST, "localhost", None) for name in names) or names[1] == "null":
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            return await send({"type": "http.response.body", "body": b"this page is for this machine alone"})

        async def guarded(message: Scope) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", ALLOWED.encode())]
            await send(message)

        return await self.app(scope, receive, guarded)


def check_gradio() -> None:
    """Raises MissingDependency: gradio is not there, or too old."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio
    except ImportError as error:
        raise MissingDependency(f'the page needs gradio 6.2 or newer ({error}): pip install "sslsr-diffusion[page]"') from None
    if tuple(int(part) for part in gradio.__version__.split(".")[:2]) < (6, 2):
        raise MissingDependency(f'the page needs gradio 6.2 or newer, got {gradio.__version__}: pip install "sslsr-diffusion[page]"')


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise UserError(f"port {port}: cannot be had ({os.strerror(error.errno or 0)}); choose another one, such as {port + 1}.") from None
