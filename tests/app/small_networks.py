"""Untrained weights of every task, images as people upload them, and networks that do not behave."""

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sgformer
from sgformer.app.networks import Networks, read_upload
from sgformer.app.session import Session


def save_weights(task: str, path: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    about = {"task": task, "model": "sgformer_n", "classes": ["ant", "bee", "cat"], "image_size": [64, 64]}
    if task == "classify":
        return sgformer.save_model(sgformer.create_model("sgformer_n", num_classes=3, img_size=64), path, about)
    from sgformer.models.pyramid import pyramid_backbone

    if task == "segment":
        from sgformer.tasks.segment.network import Segmenter

        more = {"classes": ["background", "bee", "cat"], "short_side": 48, "reduce_zero_label": False}
        Segmenter(pyramid_backbone("sgformer_n"), "semantic-fpn", 3, 16).save(path, about | more)
    elif task == "keypoints":
        from sgformer.tasks.keypoints.network import KeypointDetector

        more = {"category_ids": [1, 2, 3], "image_size": [64, 96], "sigmas": [0.1, 0.1]}
        more |= {"keypoints": ["left", "right"], "skeleton": [[1, 2]]}
        KeypointDetector(pyramid_backbone("sgformer_n"), 3, 2, width=16).save(path, about | more)
    else:
        from sgformer.tasks.detect.network import Detector

        more = {"category_ids": [1, 2, 3], "image_size": [64, 96]}
        Detector(pyramid_backbone("sgformer_n"), 3, masks=True, width=16).save(path, about | more)
    return path


def photo(seed: int = 0, size: tuple[int, int] = (80, 64), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def grey_png(width: int, height: int) -> bytes:
    """A black PNG of any size that is made, and packed, in no time."""
    pack = zlib.compressobj()
    rows = b"".join([*(pack.compress(bytes(width + 1)) for _ in range(height)), pack.flush()])
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class Here:
    """A worker in this process, where it does not matter that it cannot be stopped."""

    def __init__(self, made):
        self.made = made

    def call(self, method, *args, seconds=None):
        return getattr(self.made, method)(*args)

    def close(self):
        pass


def desk_here(*weights, **options) -> Session:
    return Session(Here(Networks([str(path) for path in weights], "cpu")), **options)


#: Images of these sides are too much for `Misbehaving`.
ENDLESS, DEADLY = (48, 48), (56, 56)


class Misbehaving(Networks):
    """Its first network never comes to an end on `ENDLESS` images, in a forward pass; `DEADLY` ones end its process."""

    def __init__(self, weights, device):
        super().__init__(weights, device)
        self.shape = None
        next(iter(self.loaded.values()))[0].model.stages[2].register_forward_hook(self._misbehave)

    def explain(self, name, picture, tokens=1.0):
        self.shape = read_upload(picture).size
        return super().explain(name, picture)

    def _misbehave(self, *_):
        while self.shape == ENDLESS:
            time.sleep(0.01)
        if self.shape == DEADLY:
            os._exit(9)

    def fail(self):
        raise KeyError("nowhere")
