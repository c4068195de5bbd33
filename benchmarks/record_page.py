"""A film and two pictures of the chat page, from a real browser: a question, the text as it comes, its
tokens, an answer from documents.

    python -m shared.serving --page --model smollm2 --quantize int8 --group-size 64 \\
        --documents weeks/11_rag/handbook
    python benchmarks/record_page.py

Needs Chromium and ffmpeg. The frames are those that the browser drew, each for as long as it was shown.
"""

import base64
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

from shared.commandline import errors_for_people, parse_args
from shared.runtime import ROOT

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-sync",
)
PATIENCE = 90_000
"""Milliseconds for an answer on a slow machine."""
LONGEST_FRAME = 3
"""Seconds that a frame is shown where nothing moves for longer."""


@dataclass(frozen=True)
class Settings:
    """Records a page that is being served."""

    url: str = "http://127.0.0.1:8000"
    out: Path = ROOT / "reports" / "12_deploy"
    question: str = "Write a short note to a friend about the sea."
    document_question: str = "At what temperature is harbour pie baked?"
    seed: int = 1


class Film:
    """The frames of a page, from the moment on when this object is made. They are kept in `folder`."""

    def __init__(self, page: Page, folder: Path):
        self._folder = folder
        self._frames: list[tuple[Path, float]] = []
        self._session = page.context.new_cdp_session(page)
        self._session.on("Page.screencastFrame", self._keep)
        self._session.send("Page.startScreencast", {"format": "png", "everyNthFrame": 1})

    def _keep(self, frame: dict[str, Any]) -> None:
        path = self._folder / f"{len(self._frames):05}.png"
        path.write_bytes(base64.b64decode(frame["data"]))
        self._frames.append((path, frame["metadata"]["timestamp"]))
        self._session.send("Page.screencastFrameAck", {"sessionId": frame["sessionId"]})

    def save(self, path: Path) -> None:
        """Ends the recording and writes it as WebM."""
        self._session.send("Page.stopScreencast")
        last_frame, last_time = self._frames[-1]
        ends = [time for _, time in self._frames[1:]] + [last_time + LONGEST_FRAME]
        lines = []
        for (frame, time), end in zip(self._frames, ends):
            lines += [f"file '{frame}'", f"duration {min(LONGEST_FRAME, end - time):.3f}"]
        lines.append(f"file '{last_frame}'")  # ffmpeg ignores the last duration without it
        listing = self._folder / "frames.txt"
        listing.write_text("\n".join(lines) + "\n", encoding="utf-8")
        source = ["-f", "concat", "-safe", "0", "-i", str(listing)]
        codec = ["-vf", "fps=12,format=yuv420p", "-c:v", "libvpx-vp9", "-crf", "36", "-b:v", "0"]
        subprocess.run(["ffmpeg", "-y", "-loglevel", "error", *source, *codec, str(path)], check=True)


def visit(browser: Browser, settings: Settings, width: int, height: int) -> Page:
    """The page in a window of its own."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.goto(settings.url)
    page.locator("#seed :is(input, textarea)").fill(str(settings.seed))
    page.locator("#seed :is(input, textarea)").blur()
    return page


def ask(page: Page, question: str) -> None:
    """Types as a person does, and waits for the end of the answer."""
    answers = page.locator("#chat [data-testid=bot]")
    before = answers.count()
    page.locator("#text textarea").press_sequentially(question, delay=40)
    page.locator("#send").click()
    expect(answers).to_have_count(before + 1, timeout=PATIENCE)
    expect(page.locator("#status")).to_contain_text("a second", timeout=PATIENCE)
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#stop")).to_be_disabled()
    page.wait_for_timeout(400)  # the buttons fade


def point(page: Page, number: int) -> None:
    """Points at a token, long enough to read what it shows."""
    token = page.locator("#tokens .shade").nth(number)
    token.scroll_into_view_if_needed()
    token.hover()
    page.wait_for_timeout(1800)


def main(settings: Settings) -> None:
    """Writes demo.webm, page.png and page-phone.png."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium or not shutil.which("ffmpeg"):
        raise ValueError("recording needs chromium and ffmpeg: install them")
    settings.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as frames:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = visit(browser, settings, 1120, 1000)
        film = Film(page, Path(frames))
        ask(page, settings.question)
        for number in (4, 9):
            point(page, number)
        page.screenshot(path=settings.out / "page.png", full_page=True)
        page.locator("#documents input").check()
        ask(page, settings.document_question)
        point(page, 1)
        film.save(settings.out / "demo.webm")
        phone = visit(browser, settings, 390, 844)
        phone.locator("#documents input").check()
        ask(phone, settings.document_question)
        phone.screenshot(path=settings.out / "page-phone.png", full_page=True)
        browser.close()
    for path in sorted(settings.out.glob("*page*.png")) + [settings.out / "demo.webm"]:
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    with errors_for_people():
        main(parse_args(Settings, sys.argv[1:], __doc__))
