"""A web service whose workers open the model, each its own: WSGI for gunicorn, which forks, ASGI for uvicorn, which spawns."""

import os
import threading

from llama_cpp import Llama

llm = Llama(os.environ["INTEGRATION_MODEL"], n_ctx=512, verbose=False)
lock = threading.Lock()


def answer():
    """Return the answer and who gave it."""
    with lock:
        text = llm("The capital of France is", max_tokens=8, temperature=0)["choices"][0]["text"]
    return f"{os.getpid()} {text.split()[0]}".encode()


def wsgi(environ, start_response):
    """Answer gunicorn."""
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [answer()]


async def asgi(scope, receive, send):
    """Answer uvicorn."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": answer()})
