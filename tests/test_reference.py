"""docs/reference names what there is, and the hooks of the site leave links between pages alone."""

import importlib
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from prfl_engine import patch
from prfl_kernels import sublayers

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/reference").glob("*.md"))
TOPICS = [
    (page.name, *found) for page in PAGES
    for found in re.findall(r"^::: (\S+)\n(?:    options:\n((?:      .*\n)+))?", page.read_text(), re.M)
]  # fmt: skip


def members(options: str) -> list[str]:
    return (yaml.safe_load(options) or {}).get("members", []) if options else []


def test_every_name_of_the_reference_is_there_and_has_a_docstring():
    """mkdocstrings leaves out a member that is not there, and says nothing."""
    missing = []
    for page, name, options in TOPICS:
        module = importlib.import_module(name)
        for member in members(options):
            value = getattr(module, member, None)
            if value is None or (callable(value) and not value.__doc__):
                missing.append(f"{page}: {name}.{member}")
    assert len(TOPICS) > 30 and not missing


def test_what_the_packages_offer_is_in_the_reference():
    named = {member for _, _, options in TOPICS for member in members(options)}
    assert set(patch.__all__) - {"Report"} <= named and set(sublayers.__all__) <= named


def test_every_page_of_docs_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f"- {page.relative_to(ROOT / 'docs').as_posix()}\n" in text


@pytest.fixture(scope="module")
def hooks():
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "scripts/docs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page, text, want", [
    ("index.md", "[a](docs/training.md#lora)", "[a](training.md#lora)"),
    ("index.md", "![a](docs/demo.webp) and [b](docs)", "![a](demo.webp) and [b](reference/index.md)"),
    ("index.md", "[a](engine/train.py)", "a"),
    ("training.md", "[a](data.md), [b](../engine/train.py)", "[a](data.md), b"),
    ("training.md", "[a](https://x.org/y), [b](#here)", "[a](https://x.org/y), [b](#here)"),
    ("training.md", "[a](../engine/gone.py)", "[a](../engine/gone.py)"),  # MkDocs refuses it
    ("reference/patch.md", "[a](../drop-in.md)", "[a](../drop-in.md)"),
])  # fmt: skip
def test_links_to_sources_become_text(hooks, page, text, want):
    file = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert hooks.on_page_markdown(text, file, None, None) == want
