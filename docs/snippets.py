"""Runs every Python snippet of a page: `python docs/snippets.py docs/interop.md`.

`make interop` does so in a fresh environment. Each gets a process and an empty folder of its own; nothing but the
standard library is needed for it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path


def main(page: str) -> int:
    """Run them; how many failed. A page without any is a mistake, too."""
    failed = ran = 0
    heading = ""
    text = Path(page).read_text(encoding="utf-8")
    for title, code in re.findall(r"^## ([^\n]*)$|```python\n(.*?)```", text, re.M | re.S):
        heading = title or heading
        if not code:
            continue
        ran += 1
        with tempfile.TemporaryDirectory(prefix="sgformer-") as folder:
            done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        print(f"{'failed' if done.returncode else 'ok':<8}{heading}", flush=True)
        if done.returncode:
            failed += 1
            print(done.stderr, file=sys.stderr)
    print(f"{ran - failed} of {ran} snippets of {page} ran")
    return failed or not ran


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
