"""The chat page: static files, and the routes that serve them from the server's own origin.

No build step: the browser runs the files of static/ as they are. The page calls /v1/models, /v1/chat/completions,
/inspect and /health only.
"""

import mimetypes
from os import PathLike, stat_result
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).parent / "static"
STATIC_PATH = "/web"

# Model output is shown as HTML. Should the sanitizer fail, these headers still block scripts, frames, foreign hosts.
HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "font-src 'self'",
            "img-src 'self' blob:",
            "connect-src 'self'",
            "frame-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Revalidate each time (cheap, by ETag): an old cached page must not call an upgraded server.
    "Cache-Control": "no-cache",
}

# The frame that draws diagrams: their library writes inline styles and HTML. It runs in an origin of its own, and
# reaches nothing.
FRAME = "diagram.html"
FRAME_HEADERS = HEADERS | {
    "Content-Security-Policy": "; ".join(
        (
            "sandbox allow-scripts",
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'unsafe-inline'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'self'",
        )
    ),
}


class PageFiles(StaticFiles):
    """Static files that carry the page's security headers."""

    def file_response(
        self,
        full_path: str | PathLike[str],
        stat_result: stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(FRAME_HEADERS if Path(full_path).name == FRAME else HEADERS)
        return response


async def index(request: Request) -> Response:
    """GET / -> the page."""
    return FileResponse(STATIC / "index.html", media_type="text/html", headers=HEADERS)


def chat_routes() -> list[BaseRoute]:
    """Routes of the chat page: GET / and its files under /web. They need no API key; the page's API calls do."""
    # Windows may map .js to text/plain in its registry, and browsers refuse modules of that type.
    mimetypes.add_type("text/javascript", ".js")
    mimetypes.add_type("font/woff2", ".woff2")
    return [Route("/", index, methods=["GET"]), Mount(STATIC_PATH, PageFiles(directory=STATIC), name="web")]
