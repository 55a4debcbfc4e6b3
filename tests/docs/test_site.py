"""The site builds strictly, fetches nothing, and says nothing that the pages in the repository do not."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("material")
pytest.importorskip("mkdocstrings")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    yield out
    shutil.rmtree(out)


class Fetched(HTMLParser):
    """What a browser loads with a page without being asked."""

    def __init__(self, text: str):
        super().__init__()
        self.urls: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.urls.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.urls.append(given["href"])


@pytest.mark.slow
def test_every_page_is_built_and_fetches_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    names = {p.relative_to(site).as_posix() for p in pages}
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").with_suffix(".html").as_posix() in names
    assert {"index.html", "source/src/sgformer/models/backbone.py.html", "source/src/sgformer/viz.html"} <= names
    for page in pages:
        for url in Fetched(page.read_text()).urls:
            assert not re.match(r"(https?:)?//", url), f"{page.name}: {url}"
            if not url.startswith("data:"):
                root = site if page.name == "404.html" else page.parent
                assert (root / url.lstrip("/").partition("?")[0]).exists(), f"{page.name}: {url}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", style.read_text())


@pytest.mark.slow
def test_the_reference_has_what_the_package_offers(site):
    import sgformer

    text = "".join(p.read_text() for p in (site / "api").glob("*.html"))
    for name in set(sgformer.__all__) - {"__version__"}:
        assert re.search(rf'id="sgformer\.[\w.]*\b{name}"', text), name
    assert ":class:" not in text and ":func:" not in text


def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "uri, before, after",
    [
        ("index.md", "docs/tour.md", "tour.md"),
        ("index.md", "docs/results.md#speed", "results.md#speed"),
        ("tour.md", "../src/sgformer/models/layers.py", "source/src/sgformer/models/layers.py.md"),
        ("tutorials/train.md", "../data.md#scenes", "../data.md#scenes"),
        ("tutorials/train.md", "../../examples/chirps.py", "../source/examples/chirps.py.md"),
        ("tour.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_are_led_into_the_site(uri, before, after):
    from types import SimpleNamespace

    page = SimpleNamespace(file=SimpleNamespace(src_uri=uri))
    assert hooks().on_page_markdown(f"[a]({before}), `b`", page) == f"[a]({after}), `b`"


def test_cells_of_tables_do_not_break_numbers_and_options():
    page = "<p><code>5 % 2 --out</code></p><td>82.5 % <code>a --epochs 14 b--c</code></td>"
    kept = "<p><code>5 % 2 --out</code></p>"
    cell = "<td>82.5&nbsp;% <code>a <span class=option>--epochs</span> 14 b--c</code></td>"
    assert hooks().on_page_content(page) == kept + cell
