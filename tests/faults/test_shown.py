"""What is shown: names of strangers reach a terminal and a log with escapes for all that could steer it."""

import ast
import contextlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from photos import QUICK, make_photos
from PIL import Image

import sgformer
from sgformer.cli import main
from sgformer.core.errors import UserError
from sgformer.core.names import is_address, is_remote, markdown, some, without_login
from sgformer.core.terminal import say
from sgformer.exporting.formats.hub import _card
from sgformer.models.checkpoint import write_safetensors
from sgformer.training.report import class_tables

SOURCE = Path(sgformer.__file__).parent
NASTY = "\x1b]0;pwned\x07\x1b[31mred\x9b2J\u202eevil\r\n\x08x"  # a title, colours, a line overwritten


def clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_all_texts_go_through_one_function():
    """`print` and the like are called there alone, and in the log's own handler, whose records are escaped before."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name == "print" or re.fullmatch(r"sys\.(stdout|stderr)\.write(lines)?", name):
                    found.add(path.relative_to(SOURCE).as_posix())
    assert found == {"core/terminal.py", "training/run_folder.py"}


def test_lines_errors_and_records_are_escaped(caplog):
    out = io.StringIO()
    say(NASTY, f"ftp://user:secret@host/{NASTY}", file=out)
    log = logging.getLogger("sgformer")
    log.warning("%s of %s", NASTY, "ftp://user:secret@host/x")
    error = str(UserError(f"{NASTY}: http://me@host/ is damaged"))
    for text in (out.getvalue(), caplog.messages[-1], error):
        assert clean(text) and "\\x1b]0;pwned\\x07" in text and "secret" not in text and "me@" not in text
    assert out.getvalue().count("\n") == 2 and "\n" not in error + caplog.messages[-1]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/x", "s3://bucket/x"),
        ("ftp://user:word@host/a@b", "ftp://host/a@b"),
        ("simplecache::ftp://user:w@rd@host:21/x: no such file", "simplecache::ftp://host:21/x: no such file"),
        ("'http://u:p@h/x' and 'http://v@h/y'", "'http://h/x' and 'http://h/y'"),
        ("ftp://u:p'\"w@h/x", "ftp://h/x"),
        ("me@host.example", "me@host.example"),
    ],
)
def test_logins_are_left_out(text, shown):
    assert without_login(text) == shown
    assert "user:" not in markdown(text)  # where a report names its data


def test_long_names_leave_room_for_what_is_said_after_them():
    listed = some(["a" * 5000, "b", *"cdefgh", "i" * 5000, "j"])
    assert len(listed) < 450 and listed.endswith(", h and 2 more") and "..., b, c" in listed
    assert some(["a" * 120, "b" * 200]) == f"{'a' * 120}, {'b' * 200}" and some([]) == ""
    assert some([f"{i}/{'long' * 20}" for i in range(8)], 8).count("...") == 8


def test_addresses_are_told_from_paths():
    assert all(map(is_address, ("s3://b", "simplecache::ftp://h/x", "a+b://c")))
    assert not any(map(is_address, ("/a/b", "a:/b", "C:\\x", "a b://c", "")))
    assert is_remote("\\\\host\\share") and is_remote("//host/share") and not is_remote("/host/share")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """Photos, one broken, and weights of every kind, with nasty names of folders, files and classes."""
    folder = tmp_path_factory.mktemp("nasty")
    photos = make_photos(folder / "data", train=2, val=1)
    odd = NASTY.replace("/", "_")
    for split in ("train", "val"):
        (photos / split / "ant").rename(photos / split / odd)
    (photos / "val" / odd / f"{odd}.png").write_bytes(b"no image")
    Image.new("RGB", (40, 32)).save(photos / "val" / odd / f"{odd} 2.png")
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=3, img_size=32)
    about = {"classes": [f"{odd}{i}" for i in range(3)], "image_size": [32, 32], "model": "sgformer_n"}
    sgformer.save_model(model, folder / f"{odd}.safetensors", about)
    write_safetensors({odd: torch.zeros(2)}, folder / "strange.safetensors", {"metadata": "{}"})
    write_safetensors({odd: torch.zeros(2)}, folder / "task.safetensors", {"format": "sgformer", "config": odd})
    torch.save({odd: torch.zeros(2), f"{odd}2": torch.zeros(1)}, folder / "strange.pth")
    return folder, odd


COMMANDS = (
    "predict W V --device cpu",
    "predict W V/gone.png",
    "predict S.safetensors V",
    "predict S.pth V",
    "predict S.pth V --model ODD",
    "predict T.safetensors V",
    "predict ODD V",
    "eval W --data D --device cpu --workers 0 --bad-images skip --out ODD",
    "eval W --data D --device cpu --workers 0",
    "explain W V --device cpu --out ODD",
    "export W --out ODD",
    "convert S.pth ODD",
    "localization W --data D",
    "data check D",
    "data from D ODD --format voc",
    "data shards D ODD",
    "data index D",
    "train classify --data D --device ODD",
    "train classify --ODD 1",
    "train ODD",
    "ODD",
    "ablate --config ODD",
    "app W --examples D/ODD",
    "app W --host ODD",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_lets_a_name_steer_the_terminal(command, nasty, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    folder, odd = nasty
    places = {"W": folder / f"{odd}.safetensors", "S": folder / "strange", "T": folder / "task", "D": folder / "data"}
    places |= {"V": folder / "data" / "val", "ODD": odd}
    words = [re.sub(r"\b(W|S|T|D|V|ODD)\b", lambda m: str(places[m[0]]), word) for word in command.split()]
    status = main(words)
    out, err = capsys.readouterr()
    assert status in (0, 1, 2) and clean(out) and clean(err), ascii(out + err)
    assert all(clean(message) for message in caplog.messages)
    assert status != 2 or err.count("sgformer: error: ") == 1


@pytest.mark.slow
def test_a_run_with_nasty_names_says_and_writes_them_escaped(nasty, tmp_path, capsys):
    folder, odd = nasty
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    options = [w for name, value in QUICK.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    words = [*options, "--device", "cpu", "--bad-images", "skip", "--max-steps", "1"]
    assert main(["train", "classify", "--data", str(data), "--run", str(tmp_path / odd), *words]) == 0
    assert all(map(clean, capsys.readouterr()))
    for name in ("log.txt", "report.md"):
        text = (tmp_path / odd / name).read_text(encoding="utf-8")
        assert clean(text), name
    (tmp_path / odd / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    assert main(["train", "classify", "--resume", str(tmp_path / odd)]) == 2
    assert all(map(clean, capsys.readouterr()))


@pytest.mark.slow
def test_a_terminal_shows_progress_without_control_characters_of_names(nasty):
    """On a terminal rich draws its bars, with control sequences of its own, but none of a name."""
    pty = pytest.importorskip("pty")
    master, terminal = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE.parent), *sys.path])}
    command = [sys.executable, "-m", "sgformer", "data", "check", str(nasty[0] / "data")]
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, stdin=terminal, env=environment)
    os.close(terminal)
    text = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
        while part := os.read(master, 4096):
            text += part
    os.close(master)
    assert process.wait(60) == 1 and b"problems" in text
    assert b"]0;pwned\x07" not in text and b"\x1b[31mred" not in text


# -- Markdown and HTML ------------------------------------------------------------------------------------------------

HTML = (
    "<script>alert(1)</script> <img src=x onerror=y> &copy; [a](http://evil) ![b](x) **c** ~~d~~ `e` $f$ | www.evil.com"
)


def rendered(text: str) -> list[str]:
    """Markdown as HTML by the renderers that are installed."""
    found = []
    try:
        import markdown as python_markdown

        found.append(python_markdown.markdown(text, extensions=["tables"]))
    except ImportError:
        pass
    try:
        from markdown_it import MarkdownIt

        found.append(MarkdownIt("gfm-like", {"linkify": False}).render(text))
    except (ImportError, ModuleNotFoundError):
        pass
    return found


def test_a_name_in_markdown_is_its_text():
    lines = class_tables(["Class", "Images"], [[HTML, 1], [NASTY, 2]])
    pages = rendered("\n".join(lines)) or pytest.skip("no Markdown renderer here")
    for page in pages:
        assert clean(page)
        for tag in ("<script", "<img", "<a ", "<strong", "<em", "<del", "<s>", "<code"):
            assert tag not in page, (tag, page)
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&amp;copy;" in page
    assert "://" not in markdown(HTML) and "www." not in markdown(HTML)


def test_a_model_card_holds_any_names():
    pytest.importorskip("huggingface_hub")
    about = {
        "image_size": [32, 32],
        "classes": [HTML, NASTY, "`\n---\nlicense: x"],
        "config": None,
        "model": f"x{HTML}",
    }
    card = _card(about, {"metrics": {HTML: 0.5}})
    assert clean(card) and "<script" not in card and card.count("\n---\n") == 1
