"""What makes a site of pages that also read well in the repository.

The README becomes the first page. Links out of docs/ lead to the files of the repository; in the site each linked file
becomes a page of its own, under source/, so that nothing has to be fetched from elsewhere.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".md": "markdown", ".js": "javascript", ".css": "css", ".toml": "toml"}
#: Front matter: sources would drown the pages in what a search finds.
UNSEARCHED = "---\nsearch:\n  exclude: true\n---\n"
CELL = re.compile(r"<td\b.*?</td>", re.S)
#: Roles that docstrings mark names with; what they mark is shown as code.
ROLE = re.compile(r":(?:class|func|meth|data|mod|attr):(?=<code>)")


def on_files(files: Any, config: Any) -> Any:
    """Add the first page and the source pages."""
    add: Callable[[str, str], None] = lambda uri, text: files.append(File.generated(config, uri, content=text))  # noqa: E731
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    pages = [(f.src_uri, Path(f.abs_src_path).read_text(encoding="utf-8")) for f in files.documentation_pages()]
    add("index.md", readme.replace("# sgformer", "# SG-Former", 1))
    wanted = {path for uri, text in [*pages, ("index.md", readme)] for path in _outside(uri, text)}
    for folder in [path for path in wanted if (ROOT / path).is_dir()]:
        wanted |= {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).glob("*.py")}
    for path in sorted(wanted):
        add(f"source/{path}.md", _source_page(path))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository become links to their pages."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown

    def rewritten(match: re.Match[str]) -> str:
        target = match[1]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = _repository_path(uri, target)
        page_uri = path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"
        return posixpath.relpath(page_uri, posixpath.dirname(uri) or ".") + (match[2] or "")

    return LINK.sub(rewritten, markdown)


def on_page_content(html: str, **_: Any) -> str:
    return CELL.sub(_unbroken, ROLE.sub("", html).replace("<code>~", "<code>"))


def _unbroken(cell: re.Match[str]) -> str:
    """In narrow cells a number keeps its per cent sign, an option its dashes."""
    return re.sub(r"(?<![\w-])(--[\w-]+)", r"<span class=option>\1</span>", re.sub(r"(\d) %", r"\1&nbsp;%", cell[0]))


def _repository_path(uri: str, target: str) -> str:
    """Where a link of a page of the site leads in the repository."""
    own = "README.md" if uri == "index.md" else f"docs/{uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(own), target))


def _outside(uri: str, text: str) -> set[str]:
    """Files and folders of the repository, outside docs/, that a page links to."""
    targets = (match[1] for match in LINK.finditer(text))
    paths = {_repository_path(uri, target) for target in targets if "://" not in target}
    return {p for p in paths if not p.startswith(("docs/", "..")) and (ROOT / p).exists()}


def _source_page(path: str) -> str:
    file = ROOT / path
    if file.is_dir():
        here = posixpath.dirname(f"source/{path}.md")
        rows = (
            f"| [`{p.name}`]({os.path.relpath(f'source/{path}/{p.name}.md', here)}) | {_first_line(p)} |"
            for p in sorted(file.glob("*.py"))
        )
        return "\n".join([UNSEARCHED, f"# {path}/", "", "| file | |", "|---|---|", *rows])
    fence, language = "`" * 6, LANGUAGES.get(file.suffix, "text")
    return "\n".join([UNSEARCHED, f"# {path}", "", fence + language, file.read_text(encoding="utf-8"), fence, ""])


def _first_line(path: Path) -> str:
    docstring = re.match(r'"""(.*?)(?:"""|\n)', path.read_text(encoding="utf-8"))
    return docstring[1] if docstring else ""
