"""What `mkdocs build` has to know of this repository (hooks of mkdocs.yml).

README.md is the first page. A link to a file outside of docs/ becomes its text, as the site has no sources;
one to a file that is not there stays, and MkDocs, which is strict, refuses it.
"""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
HOME = "index.md"
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of docs/, and README.md as the first one."""
    files.append(File.generated(config, HOME, content=(ROOT / "README.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links between pages alone."""
    here = ROOT if page.file.src_uri == HOME else (DOCS / page.file.src_uri).parent

    def linked(match: re.Match) -> str:
        image, text, target, anchor = match.groups()
        path = Path(os.path.normpath(here / target))
        if "://" in target or not path.exists():
            return match[0]
        if path == DOCS:
            path = DOCS / "reference/index.md"
        if not path.is_relative_to(DOCS):
            return text
        start = DOCS if page.file.src_uri == HOME else here
        return f"{image}[{text}]({os.path.relpath(path, start)}{anchor or ''})"

    return LINK.sub(linked, markdown)
