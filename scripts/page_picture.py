"""Make docs/page.png: the server's page while a model answers.

    $ python scripts/make_talking_model.py talking.gguf
    $ python scripts/page_picture.py talking.gguf

A server is started, the questions are asked in a headless Chromium, and the picture is taken in the middle of the last answer.
Needs the extra `test` and a chromium (`apt-get install chromium`). What the map and the figures show differs from run to run.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

OUT = Path(__file__).resolve().parent.parent / "docs" / "page.png"
QUESTIONS = ("Write a function in Python that adds two numbers.", "Why is the sky blue?")
MOST_BYTES = 200_000
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def serve(model: Path, name: str) -> tuple[subprocess.Popen[str], str]:
    """Start a server; return it and its address."""
    process = subprocess.Popen([sys.executable, "-m", "gguf_pager", "serve", str(model), "--port", "0", "--budget", "25%", "-c", "1024",
                                "--alias", name, "--no-progress"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"at (http://\S+?) ", line):
            return process, found[1]
    sys.exit(f"The server did not start:\n{''.join(said)}")


def converse(page: Any) -> None:
    """Ask all questions; return while the last one is answered."""
    page.wait_for_selector("#state[data-is=ready]", timeout=120_000)
    page.click("#settings summary")
    page.fill("#temperature", "0")
    page.click("#settings summary")
    for n, question in enumerate(QUESTIONS, 1):
        page.fill("#ask", question)
        page.press("#ask", "Enter")
        if n < len(QUESTIONS):
            page.wait_for_selector(f":nth-match(.meta, {n})", timeout=120_000)
    page.wait_for_function("() => (document.querySelector('.busy')?.textContent.length ?? 0) > 150", timeout=120_000)


def main() -> None:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", default="SmolLM2-135M, 32 experts", help="what the page calls it")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("-o", "--out", type=Path, default=OUT)
    given = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("There is no chromium: apt-get install chromium.")
    server, url = serve(given.model, given.name)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark" if given.dark else "light")
            page.goto(url)
            converse(page)
            page.screenshot(path=str(given.out), animations="disabled")
            browser.close()
    finally:
        server.terminate()
        server.wait(60)
    n_bytes = given.out.stat().st_size
    print(f"{given.out}: {n_bytes:,} bytes")
    if n_bytes > MOST_BYTES:
        sys.exit(f"That is more than {MOST_BYTES:,} bytes.")


if __name__ == "__main__":
    main()
