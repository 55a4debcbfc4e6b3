"""`sgformer app`."""

from __future__ import annotations

import contextlib
import sys

from sgformer.core.errors import UserError, require
from sgformer.core.terminal import say


def app(
    weights: tuple[str, ...] = ("sgformer_n",),
    examples: str | None = None,
    host: str = "127.0.0.1",
    allow_host: str | None = None,
    port: int = 7860,
    device: str = "auto",
) -> int:
    """Serve a page for inspecting networks: drop an image, see the prediction and what they attended to.

    Args:
        weights: one or two run folders, .safetensors or checkpoints [sgformer_n]
        examples: folder of images to choose from; by default validation images of the run
        host: address to listen on; any but loopback is open to other machines
        allow_host: further names by which browsers may call the page, e.g. that of a proxy; NAME,NAME ...
        port: port to listen on; 0 takes a free one
        device: auto, cpu, cuda, cuda:1, mps
    """
    if len(weights) > 2:
        raise UserError(f"app takes one or two networks, got {len(weights)}")
    for package, extra in (("nicegui", "app"), ("matplotlib", "train")):
        require(package, extra=extra)

    from sgformer.app.server import bind, host_names, is_loopback, serve
    from sgformer.app.session import Session

    hosts = host_names(host, allow_host.split(",") if allow_host else ())
    if not is_loopback(host):
        say(
            f"sgformer: warning: listening on {host}: anyone who can reach this machine can use the page and its "
            "processor; there is no password and no encryption",
            file=sys.stderr,
        )
    with bind(host, port) as listener:
        session = Session.load(weights, examples, device)
        with contextlib.closing(session):
            serve(session, listener, host, hosts, lambda address: say(f"{address}  (ctrl-C stops it)"))
    return 0
