"""The page as a web application: Gradio's routes, and one of ours, to which the Cog server reports."""

from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Annotated, Any

import gradio as gr
from fastapi import Body, FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from play.drawing import Drawing
from play.fields import PROMPT, read_fields
from play.files import Files
from play.page import build_page
from play.predictions import Server, ServerError
from play.progress import Hooks
from play.studio import Studio, wire

STYLE = Path(__file__).parent / "style.css"
# Gradio puts its own container before each rule of STYLE; this one is about the container, for what is sticky in it.
CONTAINER = "<style>@media (min-width: 900px) { .gradio-container { overflow: visible !important; } }</style>"
FONTS = ("system-ui", "sans-serif")  # those of this machine: Gradio's own would come from Google
MONO_FONTS = ("ui-monospace", "monospace")
HOSTS = ("127.0.0.1", "localhost")  # another name that leads here is somebody's trick
# The browser asks nobody but this page, whatever the page says, and shows it in no other page.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


def build_app(url: str, address: str, folder: Path) -> FastAPI:
    """The page for the Cog server at `url`, to be served at `address`; its files lie in `folder`.

    Raises `ServerError` when there is no such server, or it draws nothing from a prompt.
    """
    hooks = Hooks(address)
    server = Server(url, hooks)
    try:
        fields = read_fields(server.document())
    except (KeyError, TypeError):
        raise ServerError(f"{url}/openapi.json is not that of a Cog server.") from None
    if PROMPT not in fields:
        raise ServerError(f"The server at {url} takes no `{PROMPT}`.")
    page = build_page(url, fields)
    with page.blocks:
        wire(Studio(Drawing(page, server, fields, Files(folder), address)))
    app = FastAPI(openapi_url=None)

    def receive(identity: str, prediction: Annotated[dict[str, Any], Body()]) -> None:
        hooks.receive(identity, prediction)

    app.add_api_route("/webhooks/{identity}", receive, methods=["POST"])
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="",
        footer_links=[],
        run_history=False,
        allowed_paths=[str(folder)],
        ssr_mode=False,
        pwa=False,
        theme=_theme(),
        css_paths=STYLE,
        head=CONTAINER,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))
    app.add_middleware(_Policy)
    return app


def _theme() -> gr.themes.Base:
    """Gradio's own, with more contrast where its text is pale or stands on a colour."""
    theme = gr.themes.Default(primary_hue="teal", neutral_hue="stone", font=FONTS, font_mono=MONO_FONTS)
    return theme.set(
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_title_text_color="*neutral_800",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        color_accent="*primary_600",
    )


class _Policy:
    """Adds `POLICY` to every answer."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)
