"""Picture the service's page for docs/serve.md: ``python docs/screenshots.py --task NAME=FOLDER ...``.

The pictures in the repository show tasks that were trained with the bundled MiniLM, on a part of public data:

    for task in bbc-news sst2; do
      sparsepeft train --task $task --max-train-samples 800 --epochs 3 --max-length 64 --output-dir out/$task
    done
    python docs/screenshots.py --task topic=out/bbc-news --task mood=out/sst2

Needs the extra ``dev``, and Chromium (on Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).parent
TEXT = "The director's new film is a warm, funny portrait of a small bank."
_COLOURS = 128  # of a picture: few bytes, and nobody sees it


@contextmanager
def service(tasks: list[str], port: str) -> Iterator[str]:
    """The address at which the tasks are answered."""
    named = [word for task in tasks for word in ("--task", task)]
    command = [sys.executable, "-m", "sparsepeft_cli", "serve", "--port", port, *named]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr or ():
            if address := re.search(r"answers at (http://\S+)", line):
                yield address[1]
                return
        raise SystemExit("The service did not start; what it said stands above.")
    finally:
        process.terminate()
        process.communicate()


def ask(page: Any, address: str, text: str = TEXT) -> None:
    """Open the page, and have a text answered."""
    page.goto(f"{address}/")
    page.wait_for_function("document.querySelectorAll('#task option').length > 0")
    page.fill("#text", text)
    page.click("button[type=submit]")
    page.wait_for_selector("#memories:not([hidden])")


def save(part: Any, name: str, **options: Any) -> None:
    """Write a picture of a page, or a part of it, into this folder."""
    picture = Image.open(io.BytesIO(part.screenshot(**options))).convert("RGB")
    file = FOLDER / name
    picture.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)
    print(f"{file}: {file.stat().st_size / 1000:.0f} kB, {picture.width} x {picture.height}")


def main() -> None:
    """Start a service, and picture its page three times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--port", default="8080", help="It is to be seen in a picture. [default: %(default)s]")
    given = parser.parse_args()
    with service(given.task, given.port) as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1040, "height": 800})
        ask(page, address)
        save(page, "serve_answers.png", full_page=True)
        page.select_option("#other", index=2)  # after "nothing" and the task itself
        page.wait_for_function("document.querySelectorAll('.map').length === 2")
        save(page.locator("#memories"), "serve_comparison.png")
        phone = browser.new_page(
            viewport={"width": 390, "height": 844}, color_scheme="dark", device_scale_factor=2, is_mobile=True
        )
        ask(phone, address)
        phone.evaluate("document.getElementById('answers').scrollIntoView()")
        save(phone, "serve_phone.png")
        browser.close()


if __name__ == "__main__":
    main()
