"""What is wrong with a built site: links and anchors that lead nowhere, and what a browser would load from elsewhere.

    python tests/check_site.py build/site

mkdocs checks the links that are written in Markdown; here are those of the pages as they are served, with the
navigation, the references that mkdocstrings makes and the theme's files.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
LINKS_LOADED = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "modulepreload", "manifest"}
ASKED_BY_THE_THEME = {"mermaid"}  # classes for which the theme's script fetches a library of someone else's server


class Page(HTMLParser):
    """A page's anchors, what it links to and what it loads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.classes: set[str] = set()
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.classes |= set(given.get("class", "").split())
        self._style = tag == "style"
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and LINKS_LOADED & set(given.get("rel", "").split()):
            self.loads.append(given["href"])
        elif tag in LOADED:
            self.loads += [given[name] for name in (LOADED[tag],) if given.get(name)]
        self.loads += styled(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._style:
            self.loads += styled(data)

    def handle_endtag(self, tag: str) -> None:
        self._style = False


def styled(css: str) -> list[str]:
    """What a style sheet loads."""
    found = re.findall(r"""url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)""", css)
    return [first or second for first, second in found]


def elsewhere(url: str) -> bool:
    """Whether it names a server, or at least a scheme, and is no picture written out in place."""
    parts = urlsplit(url)
    return bool(parts.netloc or parts.scheme) and parts.scheme != "data"


def faults(site: Path) -> list[str]:
    """One line for each, none for a sound site."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    sheets = {path: styled(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.css"))}
    found = [] if pages else [f"{site}: no pages"]
    for path, loads in [*((path, page.loads) for path, page in pages.items()), *sheets.items()]:
        for url in loads:
            if elsewhere(url):
                found.append(f"{path.relative_to(site)}: loads {url} from elsewhere")
            elif urlsplit(url).scheme != "data" and not target(site, path, url).is_file():
                found.append(f"{path.relative_to(site)}: loads {url}, which is not there")
    for path, page in pages.items():
        for name in page.classes & ASKED_BY_THE_THEME:
            found.append(f"{path.relative_to(site)}: for the class {name} the theme loads a library from elsewhere")
        for url in dict.fromkeys(page.links):
            if elsewhere(url):
                continue
            there, anchor = target(site, path, url), unquote(urlsplit(url).fragment)
            if not there.is_file():
                found.append(f"{path.relative_to(site)}: links to {url}, which is not there")
            elif anchor and there in pages and anchor not in pages[there].anchors:
                found.append(f"{path.relative_to(site)}: links to {url}, but no such anchor is there")
    return found


def target(site: Path, page: Path, url: str) -> Path:
    """The file that a link of a page means."""
    path = unquote(urlsplit(url).path)
    if not path:
        return page
    there = (site / path.lstrip("/") if path.startswith("/") else page.parent / path).resolve()
    return there / "index.html" if there.is_dir() else there


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]).resolve())
    print("\n".join(wrong) or "links, anchors and what is loaded: sound")
    sys.exit(bool(wrong))
