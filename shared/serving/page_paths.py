"""Week 12. What the chat page asks Gradio for: everything else of Gradio is closed."""

import re

from shared.extras import needs

with needs("serve"):
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Receive, Scope, Send

USED_PATHS = re.compile(
    r"/|/(login|logout|config|theme\.css|favicon\.ico|robots\.txt)/?|/(assets|static)/.+"
    r"|/gradio_api/(queue/(join|data)|heartbeat/[^/]+|startup-events)"
)


class OnlyUsedPaths:
    """ASGI middleware around Gradio's app, which would also take files and fetch addresses.

    Raises HTTPException for all other paths: it is answered as for a path that nobody knows.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not USED_PATHS.fullmatch(scope["path"]):
            raise HTTPException(404)
        await self.app(scope, receive, send)
