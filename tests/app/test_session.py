"""What the page asks and answers, without a browser: looks of every task, the queue, the guard."""

import asyncio
import contextlib
import io
import socket
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_networks import DEADLY, ENDLESS, Here, Misbehaving, desk_here, grey_png, photo, save_weights

import sgformer
from sgformer.app import session as bounds
from sgformer.app.networks import Network, Networks, read_upload
from sgformer.app.session import Busy, Session
from sgformer.app.worker import Stopped, Worker
from sgformer.data.image import read_image
from sgformer.explaining.base import ranked_by
from sgformer.tasks.detect.explain import DetectExplainer
from sgformer.tasks.registry import TASKS

pytest.importorskip("fastapi")
from sgformer.app.server import bind, bounded, build, guard, host_names, is_loopback, read_body


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {task: save_weights(task, folder / f"{task}.safetensors") for task in TASKS}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        (folder / f"{i}.png").write_bytes(photo(i))
    return folder


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("task", TASKS)
def test_a_look_of_every_task(weights, task, monkeypatch):
    monkeypatch.setattr(DetectExplainer, "score", 0.0)
    session = desk_here(weights[task])
    result = asyncio.run(session.explain(photo(), task))
    assert result.network.task == task and session.find(result.id) is result
    answer = result.summary()
    assert answer and all(0 <= entry["share"] <= 1 for entry in answer)
    if task in ("detect", "keypoints"):
        assert len(answer) == len(result.explanation.prediction["boxes"])
    else:
        assert abs(sum(entry["share"] for entry in answer) - 1) < 1e-4
    for block, values in result.explanation.significance.items():
        for kind in result.kinds():
            assert pixels(result.map(kind, block)).shape == (*values.shape, 3)
        tokens = result.tokens(block)
        assert len(tokens["tokens"]) == len(tokens["regions"]) == values.size == tokens["height"] * tokens["width"]
        assert set(tokens["tokens"]) <= set(range(tokens["count"]))
    for wrong in (("nothing", "1.0"), ("coarse", "9.9"), ("regions", "../1.0")):
        with pytest.raises(KeyError):
            result.map(*wrong)


def test_the_dial_sets_the_tokens_of_one_look(weights):
    session = desk_here(weights["classify"])
    half, whole, double = (asyncio.run(session.explain(photo(), "classify", b)) for b in (0.5, 1.0, 2.0))
    counts = [result.tokens("1.0")["count"] for result in (half, whole, double)]
    assert counts == sorted(set(counts))
    assert not np.array_equal(half.explanation.logits, whole.explanation.logits)
    again = asyncio.run(session.explain(photo(), "classify"))
    assert np.array_equal(again.explanation.logits, whole.explanation.logits)
    for budget in (0.1, 8.0, float("nan")):
        with pytest.raises(sgformer.UserError, match=r"tokens must be between 0.25 and 4"):
            asyncio.run(session.explain(photo(), "classify", budget))


def test_colours_rise_with_significance(weights):
    result = asyncio.run(desk_here(weights["classify"]).explain(photo()))
    values = result.explanation.significance["1.0"]
    green = pixels(result.map("significance", "1.0"))[..., 1].astype(int)  # viridis: green rises throughout
    order = np.argsort(values, axis=None)
    assert (np.diff(green.ravel()[order]) >= 0).all() and green.min() < 10 and green.max() > 220


@pytest.mark.parametrize("trained", ["hybrid", "learned"])
def test_another_ranking_is_as_if_trained_with_it_and_goes_away(trained):
    model = sgformer.create_model("sgformer_n", num_classes=3, significance=trained).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        own = model(x)
        with ranked_by(model, "inverted"):
            seen = model.inspect(x)
        for key, values in seen.significance.items():
            torch.testing.assert_close(values, -(seen.coarse[key] + seen.fine[key]))
        assert torch.equal(model(x), own)


def test_two_checkpoints_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / part / "best.safetensors" for part in ("a", "b")]
    for seed, path in enumerate(paths):
        path.parent.mkdir()
        save_weights("classify", path, seed)
    session = desk_here(*paths)
    assert session.checkpoints == ["best", "b/best"]
    answers = [asyncio.run(session.explain(photo(), name)).summary() for name in session.checkpoints]
    assert answers[0] != answers[1]


def test_examples_come_from_the_run_s_own_validation_images(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = lambda weights, folder=None: bounds._examples(Path(weights), folder)  # noqa: E731
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").write_bytes(weights["classify"].read_bytes())
    for i in range(20):
        path = tmp_path / "photos" / "val" / str(i % 2) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(i, (32, 32)))
    assert len(examples("run")) == 1  # without data: a photograph that comes with matplotlib
    (tmp_path / "run" / "config.yaml").write_text("data: photos\n")
    assert [read_image(path).size for path in examples("run")] == [(32, 32)] * 9
    assert len(examples("run/best.safetensors")) == 9
    (tmp_path / "shards" / "val").mkdir(parents=True)
    (tmp_path / "shards" / "val" / "000000.tar").write_bytes(b"")
    (tmp_path / "run" / "config.yaml").write_text("data: shards\n")
    assert len(examples("run")) == 1  # no image files there
    (tmp_path / "run" / "config.yaml").write_text("[broken")
    assert len(examples("run")) == 1
    assert len(examples("run", "photos")) == 9


# -- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "empty"),
        (b"GIF89a", "damaged|truncated|not an image"),
        (photo()[:300], "damaged|truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # Pillow would call Ghostscript
        (photo(kind="TIFF"), "not of a format accepted here"),
    ],
)
def test_what_is_no_picture_is_refused(data, says):
    with pytest.raises(sgformer.UserError, match=says):
        read_upload(data)


def test_too_many_pixels_are_refused_before_decoding(monkeypatch):
    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(sgformer.UserError, match="too large"):
        read_upload(grey_png(20_000, 10_000))


def test_a_large_picture_is_reduced():
    assert read_upload(grey_png(4000, 1000)).size == (2048, 512)


class Gate:
    """In place of networks: whoever looks waits until the gate opens."""

    def __init__(self):
        self.open, self.seen = threading.Event(), []

    def describe(self):
        return [Network("one", None, "classify", "sgformer_n", ("ant",), 1, True, 0.5)]

    def explain(self, network, who, tokens=1.0):
        self.open.wait(10)
        self.seen.append(who)
        return None, None


def test_everybody_queues_and_the_last_are_turned_away(monkeypatch):
    gate = Gate()
    session = Session(Here(gate))
    monkeypatch.setattr(bounds, "QUEUE", 5)

    async def crowd():
        waiting = [asyncio.create_task(session.explain(i)) for i in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="waiting"):
            await session.explain("late")
        gate.open.set()
        await asyncio.gather(*waiting)

    asyncio.run(crowd())
    assert gate.seen == [0, 1, 2, 3, 4] and session.waiting == 0


def test_nobody_waits_for_ever(monkeypatch):
    gate = Gate()
    session = Session(Here(gate))
    monkeypatch.setattr(bounds, "PATIENCE", 0.05)

    async def two():
        slow = asyncio.create_task(session.explain("slow"))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="longer"):
            await session.explain("given up")
        with pytest.raises(Busy):
            await slow
        gate.open.set()
        monkeypatch.setattr(bounds, "PATIENCE", 10)
        await session.explain("next")

    asyncio.run(two())
    assert gate.seen == ["slow", "next"]  # who gave up is not served to nobody


@pytest.fixture(scope="module")
def misbehaving(weights):
    session = Session(Worker(Misbehaving, [str(weights["classify"])], "cpu"))
    yield session
    session.close()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0


@pytest.mark.slow  # processes that import torch are started
def test_a_look_without_end_is_stopped_and_the_queue_goes_on(misbehaving, monkeypatch):
    """Several times: no process, pipe or look is left behind, and who waits is served."""
    session, before = misbehaving, open_files()
    for _ in range(2):
        ended = session._worker._process

        async def three():
            monkeypatch.setattr(bounds, "WORK", 1.0)
            endless = asyncio.create_task(session.explain(photo(1, ENDLESS)))
            await asyncio.sleep(0)
            monkeypatch.setattr(bounds, "WORK", 100)
            others = [asyncio.create_task(session.explain(photo(seed))) for seed in (2, 3)]
            with pytest.raises(Stopped, match=r"longer than 1 seconds and was stopped\. Please try a smaller"):
                await endless
            return [result.summary() for result in await asyncio.gather(*others)]

        answers = asyncio.run(three())
        assert answers[0] != answers[1] and all(len(answer) == 3 for answer in answers)
        with pytest.raises(ValueError, match="closed"):  # killed and cleared away
            ended.is_alive()
        assert session.waiting == 0 and open_files() <= before


@pytest.mark.slow
def test_a_look_that_kills_its_process_is_told_and_the_queue_goes_on(misbehaving):
    with pytest.raises(Stopped, match="died on this image"):
        asyncio.run(misbehaving.explain(photo(1, DEADLY)))
    assert len(asyncio.run(misbehaving.explain(photo(2))).summary()) == 3
    with pytest.raises(sgformer.UserError, match="not an image"):
        asyncio.run(misbehaving.explain(b"no picture"))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*nowhere"):
        misbehaving._worker.call("fail")


class OneAtATime:
    """A pipe that notes when one thread closes it while another one is still at it."""

    def __init__(self, pipe):
        self.pipe, self.users, self.torn = pipe, 0, False

    def __getattr__(self, name):
        def call(*args):
            self.torn |= self.users > 0
            self.users += 1
            try:
                return getattr(self.pipe, name)(*args)
            finally:
                time.sleep(0.3)  # a thread does not go on at once
                self.users -= 1

        return call


@pytest.mark.slow
def test_a_worker_closed_while_asked_tells_who_asks(weights):
    """The pipe is left to the thread that waits on it: closed under its hands, its number may be another file's."""
    worker = Worker(Misbehaving, [str(weights["classify"])], "cpu")
    worker._pipe = pipe = OneAtATime(worker._pipe)
    said = []

    def ask():
        try:
            worker.call("explain", "classify", photo(1, ENDLESS))
        except Exception as error:
            said.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    while not pipe.users:
        time.sleep(0.01)
    worker.close()
    asking.join(30)
    assert [type(error) for error in said] == [Stopped] and not pipe.torn
    worker.close()  # once more does no harm


@pytest.mark.slow
def test_a_page_that_ends_does_not_wait_for_a_look_without_end(weights):
    session = Session(Worker(Misbehaving, [str(weights["classify"])], "cpu"))

    async def leave():
        endless = asyncio.create_task(session.explain(photo(1, ENDLESS)))
        await asyncio.sleep(0.2)
        session.close()
        with pytest.raises(Stopped):
            await endless

    asyncio.run(leave())
    with pytest.raises(Stopped):
        session._worker.call("describe")  # and no process takes its place


@pytest.mark.slow
def test_what_cannot_be_loaded_is_an_error_of_the_user(tmp_path):
    with pytest.raises(sgformer.UserError, match=r"none\.safetensors"):
        Worker(Networks, [str(tmp_path / "none.safetensors")], "cpu")


# -- HTTP -------------------------------------------------------------------------------------------------------------


class Slow:
    """A request whose bytes do not come, or come without end."""

    def __init__(self, part: bytes | None):
        self.part = part

    async def stream(self):
        while self.part is not None:
            yield self.part
        await asyncio.sleep(60)
        yield b""


@pytest.mark.parametrize("part, status", [(None, 408), (bytes(2**20), 413)])
def test_a_body_is_neither_slow_nor_endless(part, status, monkeypatch):
    from fastapi import HTTPException

    monkeypatch.setattr(bounds, "ARRIVAL", 0.05)
    if part:
        monkeypatch.setattr(bounds, "ARRIVAL", 30)
    with pytest.raises(HTTPException) as refused:
        asyncio.run(read_body(Slow(part)))
    assert refused.value.status_code == status


def ask(app, method="GET", path="/examples/0.jpg", body=b"", headers=(), kind="http"):
    """The status of one request to an ASGI app, its headers and its body; of a websocket, what it was sent first."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body} if kind == "http" else {"type": "websocket.connect"}

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:7860", "content-length": str(len(body)), **dict(headers)}
    scope = {
        "type": kind, "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "headers": [(k.encode(), v.encode()) for k, v in given.items()], "client": ("127.0.0.1", 1), "scheme": "http",
        "server": ("127.0.0.1", 7860), "root_path": "", "http_version": "1.1", "subprotocols": [],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    if kind == "websocket":
        return sent[0]["type"]
    parts = b"".join(m.get("body", b"") for m in sent if m["type"] == "http.response.body")
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, parts


@pytest.fixture(scope="module")
def guarded(weights, pictures):
    examples = [read_image(path) for path in sorted(pictures.iterdir())]
    return guard(build(desk_here(weights["classify"], examples=examples)), {"127.0.0.1", "localhost", "::1"})


def test_images_in_looks_out(guarded):
    import json

    status, headers, body = ask(guarded, "POST", "/explain", photo())
    said = json.loads(body)
    assert status == 200 and {e["class"] for e in said["answer"]} == {"ant", "bee", "cat"}
    assert "default-src 'self'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    for name in ("image.png", "coarse/1.0.png", "sheet.png"):
        status, headers, body = ask(guarded, path=f"/results/{said['result']}/{name}")
        assert (status, headers["content-type"], body[:4]) == (200, "image/png", b"\x89PNG"), name
    unknown = ("answer.png", "coarse/7.7.png", "anything", "tokens/9.9", "tokens/x", "tokens/1.x", "coarse/x.png")
    for name in unknown:
        assert ask(guarded, path=f"/results/{said['result']}/{name}")[0] == 404, name
    for path in (
        "/results/other/image.png",
        "/examples/3.jpg",
        "/examples/x.jpg",
        "/examples/-1.jpg",
        "/examples/1.0.jpg",
    ):
        assert ask(guarded, path=path)[0] == 404, path
    assert ask(guarded, path=f"/examples/{'9' * 5000}.jpg")[0] == 404
    status, _, body = ask(guarded, "POST", "/explain", b"no picture")
    assert status == 400 and "not an image" in json.loads(body)["error"]
    assert ask(guarded, path="/docs")[0] == 404  # FastAPI's own pages load scripts from elsewhere


@pytest.mark.slow
def test_what_was_stopped_is_said_over_http(misbehaving, monkeypatch):
    import json

    monkeypatch.setattr(bounds, "WORK", 0.5)
    status, _, body = ask(build(misbehaving), "POST", "/explain", photo(1, ENDLESS))
    assert status == 504 and "was stopped" in json.loads(body)["error"]


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"host": "localhost:9"}, 200),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"host": "[::1]:7860", "origin": "http://[::1]:7860"}, 200),
        ({"host": "evil.example:7860"}, 400),  # a name that was made to point here
        ({"host": "127.0.0.1.evil.example"}, 400),
        ({"host": "["}, 400),
        ({"host": ""}, 400),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 403),  # another server of this machine
        ({"origin": "null"}, 403),
        ({"origin": "http://["}, 403),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),  # a page, or a picture in another one
        ({"sec-fetch-site": "same-site"}, 403),
        ({"content-length": str(bounds.MAX_BYTES + 1)}, 413),
        ({"content-length": "-1"}, 413),
        ({"content-length": "²"}, 413),
        ({"content-length": "9" * 5000}, 413),
    ],
)
def test_other_sites_and_long_bodies_are_turned_away(guarded, headers, status):
    assert ask(guarded, headers=headers)[0] == status
    if status in (400, 403):
        begun = ask(guarded, headers=headers, kind="websocket")
        assert begun == ("websocket.close" if status == 403 else "websocket.http.response.start")


@pytest.mark.parametrize(
    ("host", "allowed", "names"),
    [
        ("127.0.0.1", [], {"127.0.0.1", "::1", "localhost"}),
        ("127.0.0.1", ["page.example.org"], {"127.0.0.1", "::1", "localhost", "page.example.org"}),
        ("192.0.2.1", [], {"192.0.2.1"}),
        ("0.0.0.0", ["192.0.2.1", "2001:db8::1"], {"127.0.0.1", "::1", "localhost", "192.0.2.1", "2001:db8::1"}),
        ("::", [], "--allow-host"),
        ("0.0.0.0", ["*"], "--allow-host \\*: give a name"),
        ("0.0.0.0", ["http://page.example.org"], "give a name"),
        ("0.0.0.0", ["page.example.org:80"], "give a name"),
        ("127.0.0.1", ["a\x1b"], r"a\\x1b: give"),
    ],
)
def test_the_page_answers_to_the_names_given(host, allowed, names):
    if isinstance(names, set):
        assert host_names(host, allowed) == names
    else:
        with pytest.raises(sgformer.UserError, match=names):
            host_names(host, allowed)


# -- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served(monkeypatch):
    """A session with a gate behind the page's HTTP server, a function that opens a connection, and the server."""
    import uvicorn
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    gate = Gate()
    session = Session(Here(gate))
    app = guard(build(session), {"127.0.0.1"})
    config = uvicorn.Config(app, http=bounded(AutoHTTPProtocol), log_config=None)
    server = uvicorn.Server(config)
    opened = []
    with bind("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)

        def connect(sent: bytes = b""):
            one = socket.create_connection(listener.getsockname(), 20)
            one.sendall(sent)
            opened.append(one)
            return one

        yield session, connect, server
        gate.open.set()
        for one in opened:
            one.close()
        server.should_exit = True
        thread.join(20)


def upload(length: int, body: bytes = b"") -> bytes:
    return f"POST /explain HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode() + body


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_uploads_count_before_their_bodies_are_read(served, monkeypatch):
    session, connect, _ = served
    monkeypatch.setattr(bounds, "QUEUE", 3)
    waiting = [connect(upload(1000)) for _ in range(3)]  # none sends its body
    until(lambda: session.waiting == 3)
    reply = connect(upload(bounds.MAX_BYTES)).recv(1000)
    assert reply.startswith(b"HTTP/1.1 503") and b"connection: close" in reply.lower()
    waiting[0].close()  # its place is free
    until(lambda: session.waiting == 2)


def test_connections_are_bounded_and_idle_ones_closed(served, monkeypatch):
    _, connect, server = served
    monkeypatch.setattr(bounds, "CONNECTIONS", 3)
    monkeypatch.setattr(bounds, "ARRIVAL", 0.5)
    silent = [connect(), connect(b"GET / HTTP/1.1\r\n"), connect(upload(1000))]
    until(lambda: len(server.server_state.connections) == 3)
    with contextlib.suppress(ConnectionError):
        assert connect(b"GET /x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").recv(100) == b""
    assert [one.recv(1000)[:12] for one in silent] == [b"", b"", b"HTTP/1.1 408"]
    until(lambda: not server.server_state.connections)
    assert connect(b"GET /x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").recv(100).startswith(b"HTTP/1.1 404")


def test_an_upload_that_breaks_off_leaves_nothing(served, caplog, capfd):
    session, connect, server = served
    for data in (upload(1000, b"half"), upload(1000), upload(1000)[:30]):
        connect(data).close()
    until(lambda: not server.server_state.connections and not server.server_state.tasks)
    assert (
        connect(b"GET /results/1/image.png HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").recv(100).startswith(b"HTTP/1.1 404")
    )
    assert not session.waiting and not [
        record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")
    ]
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("host, inside", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)])
def test_loopback_is_told_from_the_rest(host, inside):
    assert is_loopback(host) == inside and not is_loopback("example.org")


def test_a_taken_port_is_named():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(sgformer.UserError, match=f"port {port}.*in use"):
            bind("127.0.0.1", port)
