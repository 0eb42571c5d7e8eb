"""Take screenshots of the web page of a running service, in both themes, at the widths of a desktop and of a phone.

python -m docs.pictures.page http://127.0.0.1:8000 shots     # writes shots/*.png; needs Chromium
python -m docs.pictures.page http://127.0.0.1:8000           # writes docs/pictures/page.png, for docs/how-to/clients.md
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

README = Path(__file__).parent / "page.png"
WIDTHS = {1280: 900, 390: 844}  # width -> height of the window in pixels


def settled(page: Page, address: str) -> None:
    """Open the web page, and wait until each panel shows its first answer and all pictures are loaded."""
    page.goto(address)
    expect(page.locator(".status strong")).to_have_count(4, timeout=60_000)
    expect(page.locator("[aria-busy=true]")).to_have_count(0)
    for picture in page.locator(".pictures img").all():
        picture.scroll_into_view_if_needed()
    page.evaluate("Promise.all([...document.images].filter((image) => image.src).map((image) => image.decode()))")
    page.evaluate("scrollTo({ top: 0, behavior: 'instant' })")


def main(address: str, folder: str | None = None) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for theme in ("light", "dark") if folder else ("light",):
            for width, height in WIDTHS.items() if folder else ((1280, 900),):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
                settled(page, address)
                picture = page.screenshot(full_page=True)
                if folder:
                    Path(folder).mkdir(parents=True, exist_ok=True)
                    (Path(folder) / f"page-{theme}-{width}.png").write_bytes(picture)
                else:
                    panels = page.locator("#models").bounding_box()
                    assert panels
                    screenshot = Image.open(io.BytesIO(picture)).crop((0, 0, width, round(panels["y"])))
                    screenshot.resize((800, round(screenshot.height * 800 / width)), Image.Resampling.LANCZOS).quantize(
                        128
                    ).save(README, optimize=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
