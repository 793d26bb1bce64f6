"""The paths of the page. What it shows of the engine it asks of the API, as any client does."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from saqqara.compression.methods import method_table

# Nothing from elsewhere, no script or style in the page itself, no frame around it, and no text
# that could become markup (trusted types): what a model writes stays text.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
SUGGESTED = "recommended-adaptive"  # where the server keeps everything: it fits any model
_FILES = {
    "/": ("index.html", "text/html"),
    "/ui/page.css": ("page.css", "text/css"),
    "/ui/page.js": ("page.js", "text/javascript"),
}


def add_page(app: FastAPI, retention: str, *, needs_key: bool) -> None:
    """Serve the page at `/` and its parts below `/ui/`.

    Args:
        app: the server's application.
        retention: the label of what requests get that do not say.
        needs_key: whether the API asks for a key; the page itself and its settings need none.
    """
    for path, (name, media_type) in _FILES.items():
        _add(app, path, _file(name), media_type)
    settings = JSONResponse(page_settings(retention, needs_key=needs_key)).body
    _add(app, "/ui/settings.json", bytes(settings), "application/json")


def page_settings(retention: str, *, needs_key: bool) -> dict[str, Any]:
    """What the page must know before it can ask: the methods that there are."""
    methods = [
        {
            "name": row.name,
            "keeps": row.keeps,
            "needs": row.needs,
            "takes_budget": row.needs.startswith("a budget"),
        }
        for row in method_table()
    ]
    return {
        "default": retention,
        "suggested": SUGGESTED,
        "methods": methods,
        "needs_key": needs_key,
    }


def _file(name: str) -> bytes:
    return files(__package__).joinpath(name).read_bytes()


def _add(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    async def answer() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    app.add_api_route(path, answer, methods=["GET", "HEAD"], response_model=None)
