"""A web app on a port of this machine, run in a thread of the notebook."""

import threading
from typing import Any

import uvicorn


class LocalServer:
    """Serves an app until `stop`, on a free port that no other machine can reach.

    `url` is its address. Raises RuntimeError where the app does not start.
    """

    def __init__(self, app: Any):
        self._server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.05)
            if not self._thread.is_alive():
                raise RuntimeError("the app did not start: see what uvicorn said")
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> bool:
        """Ends the server within 30 seconds. Returns whether it has ended."""
        self._server.should_exit = True
        self._thread.join(30)
        return not self._thread.is_alive()
