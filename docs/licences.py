"""Writes docs/licences.md: the licences of what an installation of `.[dev]` needs, from the packages' own metadata."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

EXTRAS = ("", "train", "demo", "detect", "bench", "dev")


def needs(name: str, extras: tuple[str, ...]) -> set[str]:
    """Names of the packages that one needs directly on this machine."""
    from packaging.requirements import Requirement

    found = set()
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
            found.add(requirement.name)
    return found


def licence(name: str) -> str:
    """A few words, from the metadata's expression, else its classifiers, else its text."""
    about = distribution(name).metadata
    kinds = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License")]
    text = about.get("License-Expression") or ", ".join(kinds) or (about.get("License") or "see the package")
    return " ".join(text.split("\n")[0].split())[:90]


def table() -> str:
    todo, seen = [("sgformer", EXTRAS)], {}
    while todo:
        name, extras = todo.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in seen:
            continue
        try:
            seen[key] = distribution(name).version, licence(name)
        except PackageNotFoundError:
            continue  # of another platform or Python
        todo += [(need, ("",)) for need in needs(name, extras)]
    rows = [f"| {name} | {version} | {kind} |" for name, (version, kind) in sorted(seen.items()) if name != "sgformer"]
    return "\n".join(["| package | version | licence |", "|---|---|---|", *rows])


if __name__ == "__main__":
    page = Path(__file__).with_suffix(".md")
    page.write_text(
        "# Licences of the dependencies\n\n"
        "sgformer is Apache-2.0. These are the packages that `pip install '.[dev]'` installs, with the licence stated\n"
        "in each package's metadata. `make licences` writes this page.\n\n" + table() + "\n"
    )
