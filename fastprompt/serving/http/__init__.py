"""The server: OpenAI-compatible endpoints, administration, access and metrics over an engine.

`create_app` makes the ASGI application, `server.run` serves it until a signal ends it.
"""

from fastprompt.serving.http.access import Access
from fastprompt.serving.http.app import create_app
from fastprompt.serving.http.options import Options

__all__ = ["Access", "Options", "create_app"]
