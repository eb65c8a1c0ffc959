"""Open every page of the built site in Chromium, on a phone and on a desk, and say what is wrong: `make docs-look`.

    python tests/look_at_site.py build/site build/look --chromium /usr/bin/chromium

A fault is an error on the console, a request that fails or leaves the site, a page wider than its screen, a search that
does not find what it should, and a copy button that takes something else. Screenshots of each page stay in the second
folder.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import sys
import threading
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

SCREENS = {"phone": (390, 844), "desk": (1280, 900)}
TALLEST = 4000  # pixels of a screenshot
SOUGHT = {
    "alpha-beta": "mathematics.html#the-alpha-beta-family",
    "GKDTrainer": "drop-ins/trl.html",
}  # and a page among those found


class Quiet(http.server.SimpleHTTPRequestHandler):
    """The site's files, without a line on the console for each."""

    def log_message(self, format: str, *args: object) -> None: ...


def serve(site: Path) -> str:
    """Start a server that ends with this process; its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/"


def listen(page: Page, address: str, faults: list[str]) -> None:
    """Add what the browser complains of to `faults`."""

    def said(what: str) -> None:
        faults.append(f"{page.url.removeprefix(address)}: {what}")

    page.on("pageerror", lambda error: said(f"raises {error}"))
    page.on("console", lambda message: said(f"says {message.text}") if message.type == "error" else None)
    page.on(
        "request",
        lambda asked: None if asked.url.startswith((address, "data:", "blob:")) else said(f"asks {asked.url}"),
    )
    page.on("response", lambda got: said(f"got {got.status} for {got.url}") if got.status >= 400 else None)


def look(page: Page, address: str, name: str, shot: Path) -> list[str]:
    """Open a page and draw it; what is wrong with its width."""
    page.goto(address + name, wait_until="load")
    height, wide, screen = page.evaluate(
        "[document.documentElement.scrollHeight, document.scrollingElement.scrollWidth, innerWidth]"
    )
    shot.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=shot, full_page=True, clip={"x": 0, "y": 0, "width": screen, "height": min(height, TALLEST)})
    return [f"{name}: {wide} pixels wide on a screen of {screen}"] if wide > screen else []


def search(page: Page, address: str, words: str, wanted: str) -> list[str]:
    """Type into the search field of the first page; whether the wanted page is among the results."""
    page.goto(address + "index.html", wait_until="networkidle")
    button = page.locator("label[for=__search].md-header__button")
    field = page.locator("input.md-search__input")
    (button if button.is_visible() else field).click()
    field.press_sequentially(words, delay=30)  # as a hand types: the script listens to keys
    result = page.locator(f".md-search-result__item a[href*='{wanted}']").first
    try:
        result.wait_for(state="attached", timeout=20_000)
    except Exception:  # playwright's own TimeoutError
        return [f"search: {words!r} does not find {wanted}"]
    return []


def copy(page: Page, address: str) -> list[str]:
    """Whether the copy button would take the lines of the first block of code as they are."""
    page.goto(address + "index.html", wait_until="load")
    written, taken = page.evaluate(
        """() => {
            const code = document.querySelector("pre code");
            code.setAttribute("data-md-copying", "");
            return [code.textContent.trimEnd(), code.innerText.trimEnd()];
        }"""
    )
    return [] if taken == written else [f"copy: {taken!r} instead of {written!r}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--chromium", help="the browser's executable; playwright's own, if it has one")
    args = parser.parse_args()
    names = [str(path.relative_to(args.site)) for path in sorted(args.site.rglob("*.html"))]
    address, faults = serve(args.site), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for screen, (width, height) in SCREENS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            listen(page, address, faults)
            for name in names:
                faults += look(page, address, name, args.out / screen / Path(name).with_suffix(".png"))
            for words, wanted in SOUGHT.items():
                faults += search(page, address, words, wanted)
            faults += copy(page, address)
            page.close()
        browser.close()
    print("\n".join(faults) or f"{len(names)} pages on {len(SCREENS)} screens: sound")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
