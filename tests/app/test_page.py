"""The page in a real browser: what a visitor does and sees, and twenty visitors at once."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from small_networks import grey_png, photo, save_weights

from sgformer.cli import main

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytest.importorskip("nicegui")
pytestmark = pytest.mark.slow  # a server, and a browser, are started


# The command, which says what it looks up or calls beyond this machine's loopback.
WATCHED = """
import sys
def watch(event, words):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.connect"):
        place = words[1] if event == "socket.connect" else words[0]
        if not isinstance(place, str | bytes) or event != "socket.connect":  # a socket of the file system is no call
            if (place if isinstance(place, str) else place[0]) not in ("127.0.0.1", "::1"):
                print("looked up", event, ascii(place), file=sys.stderr)
sys.addaudithook(watch)
from sgformer.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address and working folder of `sgformer app` with two classifiers."""
    folder = tmp_path_factory.mktemp("app")
    for seed, name in enumerate(("one", "two")):
        save_weights("classify", folder / f"{name}.safetensors", seed)
    (folder / "photos").mkdir()
    for i in range(4):
        (folder / "photos" / f"{i}.png").write_bytes(photo(i))
    command = "app one.safetensors two.safetensors --examples photos --port 0 --device cpu"
    before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", WATCHED, *command.split()], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
    with urllib.request.urlopen(line.split()[0]) as plain:  # a visitor without a websocket does no harm
        assert plain.status == 200
    yield line.split()[0]
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and "Traceback" not in errors and not out, errors
    assert "looked up" not in errors, errors
    assert "pwned" not in errors and all(line.isprintable() for line in errors.splitlines()), ascii(errors)
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == before  # nothing was written beside the weights


@pytest.fixture
def page(server):
    """The page, opened; at the end nothing was fetched from elsewhere and the browser had nothing to complain about."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_default_timeout(120_000)  # a busy machine is no failure
        asked, complaints = set(), []
        page.on("request", lambda request: asked.add(request.url))
        page.on("websocket", lambda socket: asked.add(socket.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.goto(server)
        page.wait_for_selector(".sg-share")  # it opens with the first example
        yield page
        elsewhere = {url for url in asked if not re.match(rf"(http|ws)://{server.removeprefix('http://')}/|data:", url)}
        browser.close()
        assert asked and not elsewhere
        assert [c for c in complaints if "400 (Bad Request)" not in c] == []


def upload(page, data: bytes, name: str = "mine.png") -> None:
    page.set_input_files("input[type=file]", [{"name": name, "mimeType": "image/png", "buffer": data}])


def shown_shares(page) -> list[tuple[str, str]]:
    names, shares = (page.locator(f".sg-panel >> nth=0 >> .sg-{part}").all_inner_texts() for part in ("name", "share"))
    return list(zip(names, shares, strict=True))


def ask(server: str, data: bytes, network: str = "one") -> tuple[int, dict]:
    request = urllib.request.Request(f"{server}/explain?network={network}", data=data, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask_until_served(server: str, data: bytes) -> tuple[int, dict]:
    """As a visitor does who is asked to try again, on a machine that is busy with other things."""
    answer = ask(server, data)
    while answer[0] == 503:
        answer = ask(server, data)
    return answer


def percents(answer: list[dict]) -> list[tuple[str, str]]:
    return [(entry["class"], f"{100 * entry['share']:.0f} %") for entry in answer]


def test_upload_read_slide_hover(page, server, tmp_path):
    before = page.locator(".sg-image").first.get_attribute("src")
    mine = photo(7, (96, 96))
    upload(page, mine)
    page.wait_for_function("before => document.querySelector('.sg-image').getAttribute('src') != before", arg=before)
    page.wait_for_function("document.querySelector('.sg-image').complete")
    assert shown_shares(page) == percents(ask(server, mine)[1]["answer"])

    layer = page.locator("img.sg-layer").first
    assert page.locator(".sg-where").first.inner_text() == "Stage 1, block 1 · 16 x 16 places"
    first = layer.get_attribute("src")
    page.locator(".q-slider__track-container").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("text => document.querySelector('.sg-where').innerText.startsWith(text)", arg="Stage 2")
    page.wait_for_function("before => document.querySelector('img.sg-layer').getAttribute('src') != before", arg=first)
    assert layer.get_attribute("src").endswith("/significance/2.0.png")
    page.locator(".q-slider__track-container").nth(1).focus()
    for _ in range(2):
        page.keyboard.press("PageDown")
    page.wait_for_function("document.querySelector('img.sg-layer').style.opacity == 0")

    box = page.locator(".sg-picture").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.wait_for_selector("canvas.sg-layer:visible")
    told = page.locator(".sg-hint").first.inner_text()
    count = int(re.search(r"(\d+) places merged into one", told)[1])
    result = layer.get_attribute("src").split("/")[2]
    with urllib.request.urlopen(f"{server}/results/{result}/tokens/2.0") as answer:
        grid = json.load(answer)
    middle = grid["tokens"][grid["height"] // 2 * grid["width"] + grid["width"] // 2]
    assert count == grid["tokens"].count(middle) > 1
    lit = page.evaluate(
        """() => { const c = document.querySelector('canvas.sg-layer');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        return Array.from({ length: d.length / 4 }, (_, i) => d[4 * i + 3] < 140); }"""
    )
    assert lit == [token == middle for token in grid["tokens"]]
    page.mouse.move(0, 0)
    page.wait_for_selector("canvas.sg-layer", state="hidden")
    page.screenshot(path=tmp_path / "page.png")
    assert np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).std() > 20


def test_two_networks_side_by_side_and_their_sheets(page, server):
    page.get_by_text("side by side").click()
    page.wait_for_selector(".sg-panel >> nth=1 >> .sg-share")
    sources = [page.locator(f".sg-panel >> nth={i} >> .sg-image").get_attribute("src") for i in (0, 1)]
    shares = [page.locator(f".sg-panel >> nth={i} >> .sg-prediction").inner_text() for i in (0, 1)]
    assert sources[0] != sources[1] and shares[0] != shares[1]  # one and two
    page.locator(".sg-panel >> nth=1 >> .q-select >> nth=0").click()
    page.get_by_role("option", name="one, ranked by fine").click()
    page.wait_for_function(
        "old => document.querySelectorAll('.sg-image')[1].getAttribute('src') != old", arg=sources[1]
    )
    page.locator(".sg-panel >> nth=1 >> .q-select >> nth=1").click()
    page.get_by_role("option", name="regions").click()
    page.wait_for_selector("img.sg-layer[src*='/regions/']")
    box = page.locator(".sg-picture").first.bounding_box()
    page.mouse.move(box["x"] + 9, box["y"] + 9)
    page.wait_for_function("document.querySelectorAll('.sg-ring').length == 2")  # hovering one lights up both
    with page.expect_download() as download:
        page.locator(".sg-sheet >> nth=1").click()
    assert download.value.suggested_filename == "one-ranked-by-fine.png"
    assert Image.open(download.value.path()).size[0] > 800


def test_the_dial_sets_how_many_tokens_a_network_spends(page):
    def said():
        return page.locator(".sg-dial .sg-where").first.inner_text()

    where = page.locator(".sg-image").first.get_attribute("src")
    usual = re.fullmatch(r"Tokens x 1 · (\d+) key/value tokens", said())
    dial = page.locator(".sg-dial .q-slider__track-container").first
    dial.focus()
    for budget in ("0.71", "0.5"):  # a step is a factor of the square root of 2
        page.keyboard.press("ArrowLeft")
        text = f"Tokens x {budget} ·"
        page.wait_for_function("t => document.querySelector('.sg-dial .sg-where').innerText.startsWith(t)", arg=text)
    page.wait_for_function("old => document.querySelector('.sg-image').getAttribute('src') != old", arg=where)
    half = re.fullmatch(r"Tokens x 0.5 · (\d+) key/value tokens", said())
    assert int(half[1]) < int(usual[1])


def test_a_broken_upload_and_a_bomb_are_told_and_nothing_breaks(page):
    before = shown_shares(page)
    for data, says in ((b"no picture", "not an image"), (grey_png(20_000, 10_000), "too large")):
        upload(page, data)
        page.wait_for_function("t => document.querySelector('.sg-error')?.innerText.includes(t)", arg=says)
        assert shown_shares(page) == before
    page.locator(".sg-example >> nth=2").click()
    page.wait_for_selector(".sg-error", state="hidden")


def test_twenty_at_once_get_each_their_own_answer(server):
    images = [photo(seed) for seed in range(20)]
    with ThreadPoolExecutor(20) as crowd:
        answers = list(crowd.map(lambda data: ask_until_served(server, data), images))
    assert [status for status, _ in answers] == [200] * 20
    alone = [ask(server, data)[1]["answer"] for data in images]
    assert [said["answer"] for _, said in answers] == alone
    assert len({json.dumps(answer) for answer in alone}) == 20


def test_bad_uploads_over_http(server):
    assert ask(server, grey_png(20_000, 10_000))[0] == 400
    assert ask(server, b"")[0] == 400
    assert ask(server, photo(), "none")[0] == 404
    noise = io.BytesIO()
    Image.effect_noise((3000, 3000), 90).save(noise, "PNG")
    assert ask(server, noise.getvalue())[0] == 200


def test_what_breaks_off_or_comes_from_elsewhere_leaves_no_trace(server):
    """That nothing is said about it is seen when the server ends."""
    host, port = server.removeprefix("http://").split(":")
    upload = f"POST /explain HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 1000\r\n\r\nhalf".encode()
    for data in (upload, upload[:30], b"\x16\x03\x01\x02", b"GET / HTTP/1.1\r\n" + b"a" * 70_000, b""):
        with socket.create_connection((host, int(port)), 20) as one:
            one.sendall(data)
    for header, status in (({"Sec-Fetch-Site": "cross-site"}, 403), ({"Host": "evil.example"}, 400), ({}, 200)):
        request = urllib.request.Request(f"{server}/", headers=header)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.status == status
        except urllib.error.HTTPError as error:
            assert error.code == status
    for path in ("/examples/x.jpg", "/results/x/tokens/y", "/results/x/image.png", "/%1b]0;pwned%07", "/results/%1b"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server}{path}", timeout=60)


def test_a_name_is_needed_beyond_this_machine(capsys):
    assert main(["app", "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0: name the addresses that visitors will type with --allow-host" in capsys.readouterr().err


def test_beyond_this_machine_it_warns(tmp_path):
    save_weights("classify", tmp_path / "n.safetensors")
    words = ["-m", "sgformer", "app", "n.safetensors", "--host", "0.0.0.0", "--allow-host", "gpu1.example.org"]
    words += ["--port", "0", "--device", "cpu"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline().startswith("http://0.0.0.0:")
    process.terminate()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 143 and errors.count("\n") == 1 and "warning: listening on 0.0.0.0" in errors
