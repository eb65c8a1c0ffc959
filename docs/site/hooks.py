"""What mkdocs does beside Markdown: pages of a folder in the navigation, and formulas of the prose as formulas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

TAG = re.compile(r"(<[^>]*>)")
VERBATIM = ("code", "pre", "script", "style", "svg")
# One letter, with the hat of q̂ or the d of dL/dz, is a symbol; sm_90 and the like are words.
SYMBOL = r"(?<![A-Za-z0-9])((?:JSD|phi|d?[A-Za-zα-ωΑ-Ω])\N{COMBINING CIRCUMFLEX ACCENT}?)"
SUBSCRIPT = re.compile(SYMBOL + r"_(\{[^{}]+\}|head|tail|\w)(?!\w)")
SUPERSCRIPT = re.compile(r"([\w)\]\N{COMBINING CIRCUMFLEX ACCENT}])\^(\{[^{}]+\}|\([^()]+\)|−?\w+)")


def formulas(html: str) -> str:
    """Write q_y, p^α and e^{−cx} with subscripts and superscripts, outside of code."""
    pieces, verbatim = TAG.split(html), 0
    for i, piece in enumerate(pieces):
        if name := re.match(r"<(/?)(\w+)", piece):
            verbatim += (name[2] in VERBATIM) * (-1 if name[1] else 1)
        elif not verbatim:
            raised = SUPERSCRIPT.sub(lambda found: f"{found[1]}<sup>{_bare(found[2])}</sup>", piece)
            pieces[i] = SUBSCRIPT.sub(lambda found: f"{found[1]}<sub>{_bare(found[2])}</sub>", raised)
    return "".join(pieces)


def on_config(config: Any) -> None:
    """In the navigation FOLDER/ stands for the folder's pages, its README first."""
    for section in config.nav:
        for title, pages in section.items():
            if isinstance(pages, list):
                section[title] = [_expanded(entry, Path(config.docs_dir)) for entry in pages]


def on_page_content(html: str, **_: Any) -> str:
    """Every page's formulas."""
    return formulas(html)


def _expanded(entry: dict[str, str], docs: Path) -> dict[str, Any]:
    """An entry with the pages of the folder that it names."""
    return {title: _pages(docs, page) if page.endswith("/") else page for title, page in entry.items()}


def _pages(docs: Path, folder: str) -> list[str]:
    """The folder's index, README.md inside it or FOLDER.md beside it, and its pages by name."""
    names = [str(path.relative_to(docs)) for path in sorted((docs / folder).glob("*.md"))]
    index = f"{folder}README.md" if f"{folder}README.md" in names else f"{folder.rstrip('/')}.md"
    return [index, *(name for name in names if name != index)]


def _bare(script: str) -> str:
    """Without the brackets that only hold it together."""
    return script[1:-1] if script[0] in "{(" else script
