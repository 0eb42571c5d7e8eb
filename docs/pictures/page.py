"""Take screenshots of the web page of a running service, in both themes, at the widths of a desktop and of a phone.

python -m docs.pictures.page http://127.0.0.1:8000 shots     # writes shots/*.png; needs Chromium
python -m docs.pictures.page http://127.0.0.1:8000           # writes docs/pictures/page.png, for the README
"""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

PICTURE = Path(__file__).parent / "page.png"
WIDTHS = {1280: 900, 390: 844}  # width -> height of the window in pixels


def settled(page: Page, address: str) -> None:
    """Open the web page, and wait until each panel shows its first answer."""
    page.goto(address)
    expect(page.locator(".status strong")).to_have_count(4, timeout=60_000)
    expect(page.locator("[aria-busy=true]")).to_have_count(0, timeout=60_000)
    page.wait_for_load_state("networkidle")


def main(address: str, folder: str | None = None) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for theme in ("light", "dark") if folder else ("light",):
            for width, height in WIDTHS.items() if folder else ((1280, 900),):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
                settled(page, address)
                if folder:
                    Path(folder).mkdir(parents=True, exist_ok=True)
                    page.screenshot(full_page=True, path=Path(folder) / f"page-{theme}-{width}.png")
                    page.locator("summary").evaluate_all(
                        "(all) => all.forEach((each) => (each.parentElement.open = true))"
                    )
                    page.wait_for_load_state("networkidle")
                    page.screenshot(full_page=True, path=Path(folder) / f"page-{theme}-{width}-open.png")
                else:
                    screenshot = Image.open(io.BytesIO(page.locator(".panels").screenshot()))
                    small = screenshot.resize(
                        (800, round(screenshot.height * 800 / screenshot.width)), Image.Resampling.LANCZOS
                    )
                    small.convert("RGB").save(PICTURE, optimize=True)
                page.close()
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
