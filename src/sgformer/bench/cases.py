"""Benchmark cases: a network, a size and a backend, and how to turn them into a step function without arguments."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import sgformer
from sgformer.backends.native import UnavailableError
from sgformer.core.errors import UserError, require

BACKENDS = ("eager", "optimize", "triton", "compile", "onnxruntime", "openvino")
EXPORTED = ("onnxruntime", "openvino")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        model: a timm name, "plain_s" (``plain`` is short for it) for benchmarks/plain.py, or "FILE.py:FUNCTION".
        image_size: height and width in pixels.
        batch_size: images per step.
        mode: "infer": forward without gradients; "train": forward, cross entropy, backward.
        backend: "eager"; "optimize": SG-Former only, ``sgformer.optimize`` for inference, ``sgformer.accelerate`` for
            training; "triton": these with ``triton=True``, on a GPU; "compile": ``torch.compile``, and for inference
            with SG-Former ``sgformer.optimize(compile=True)``, which compiles block by block; "onnxruntime",
            "openvino": inference only, exported to ONNX.
        coarse: reach of the coarse heads, for SG-Former and plain only; None: the size's own.
        grad_checkpointing: recompute each block in the backward pass instead of storing its activations.
        precision: "fp32"; "bf16"; "fp16"; "int8". For ``optimize`` in inference on the CPU that of its kernels; for
            "openvino" bf16 is computed throughout and int8 by static quantization; elsewhere bf16 and fp16 are mixed.
        device: a torch device.
        threads: CPU threads of torch and onnxruntime; None: torch's default.
        tokens: token budget (``sgformer.set_token_budget``), for SG-Former only.
    """

    model: str
    image_size: int = 224
    batch_size: int = 1
    mode: str = "infer"
    backend: str = "eager"
    coarse: str | None = None
    grad_checkpointing: bool = False
    precision: str = "fp32"
    device: str = "cpu"
    threads: int | None = None
    tokens: float = 1.0

    def label(self) -> str:
        words = [self.model, f"{self.image_size} px", f"batch {self.batch_size}", self.mode, self.backend]
        words += [f"coarse {self.coarse}"] if self.coarse else []
        words += [f"tokens x {self.tokens:g}"] if self.tokens != 1 else []
        words += [self.precision] if self.precision != "fp32" else []
        words += ["checkpointing"] if self.grad_checkpointing else []
        return ", ".join(words)


class Unsupported(Exception):
    """The network does not support this way of running; the message is one line."""


def is_ours(name: str) -> bool:
    return name.startswith("sgformer_")


def is_plain(name: str) -> bool:
    return name == "plain" or name.startswith("plain_")


def check_model(name: str) -> None:
    """Raise UserError unless ``name`` names a network that can be built."""
    if is_plain(name):
        size = name.removeprefix("plain").removeprefix("_") or "s"
        if f"sgformer_{size}" not in sgformer.VARIANTS:
            raise UserError(f"no model named {name!r}: sgformer has no size {size!r}")
        _plain_file()
    elif ".py:" in name:
        if not Path(name.rpartition(":")[0]).is_file():
            raise UserError(f"{name.rpartition(':')[0]}: no such file")
    elif not timm.is_model(name):
        close = difflib.get_close_matches(name, [*timm.list_models(), "plain_s"], n=1)
        raise UserError(f"no model named {name!r}{f': did you mean {close[0]}?' if close else ''}")


def create(case: Case) -> nn.Module:
    """Build the case's network with fresh weights, in its mode, on the default device ("meta" for counting).

    Raises:
        Unsupported: the network lacks an option of the case.
    """
    options: dict[str, Any] = {}
    if case.coarse is not None and (is_ours(case.model) or is_plain(case.model)):
        options["coarse"] = case.coarse
    if is_plain(case.model):
        module = _load(_plain_file())
        model = module.create(case.model.removeprefix("plain").removeprefix("_") or "s", **options)
    elif ".py:" in case.model:
        file, _, function = case.model.rpartition(":")
        model = getattr(_load(Path(file)), function)()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = timm.create_model(case.model, img_size=case.image_size, **options)
            except TypeError:  # convolutional networks take no image size
                model = timm.create_model(case.model, **options)
    if case.grad_checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise Unsupported("this network has no gradient checkpointing")
        model.set_grad_checkpointing(True)
    if case.tokens != 1:
        if not is_ours(case.model):
            raise Unsupported("SG-Former alone has a token budget")
        sgformer.set_token_budget(model, case.tokens)
    return model.train(case.mode == "train")


def build(case: Case) -> Callable[[], Any]:
    """Build the function to time: it runs one step of the case.

    Raises:
        Unsupported: the network or the machine does not support the case.
    """
    device = torch.device(case.device)
    if case.threads:
        torch.set_num_threads(case.threads)
    if case.backend in ("optimize", "triton") and not is_ours(case.model):
        raise Unsupported("sgformer.optimize and sgformer.accelerate support SG-Former only")
    torch.manual_seed(0)
    model = create(case).to(device)
    image = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device)
    if case.backend in EXPORTED:
        return _exported_step(model, image, case)
    narrow = case.backend == "optimize" and case.mode == "infer" and case.device == "cpu"
    if case.precision == "int8" and not narrow:
        raise Unsupported("int8 is measured for inference on the CPU, with optimize and openvino")
    forward = _prepare(model, case)
    dtype = None if narrow else AUTOCAST[case.precision]

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    if case.mode == "infer":

        def infer() -> Tensor:
            with torch.inference_mode(), autocast():
                out = forward(image)
            wait()
            return out

        return infer

    classes = torch.randint(model.num_classes if hasattr(model, "num_classes") else 1000, (case.batch_size,))
    classes = classes.to(device)

    def train() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        with autocast():
            loss = F.cross_entropy(forward(image), classes)
        loss.backward()
        wait()
        return loss.detach()

    return train


def _prepare(model: nn.Module, case: Case) -> nn.Module:
    if case.backend == "triton":
        try:
            prepare = sgformer.optimize if case.mode == "infer" else sgformer.accelerate
            return prepare(model, triton=True)
        except UserError as error:
            raise Unsupported(str(error)) from error
    if case.backend == "optimize":
        if case.mode == "infer":
            try:
                return sgformer.optimize(model, precision=case.precision if case.device == "cpu" else "fp32")
            except UserError as error:
                raise Unsupported(str(error)) from error
        if case.device != "cpu" or case.precision != "fp32":
            raise Unsupported("sgformer.accelerate supports training in fp32 on the CPU only")
        try:
            return sgformer.accelerate(model)
        except UnavailableError as error:
            raise Unsupported(str(error)) from error
    if case.backend == "compile" and is_ours(case.model) and case.mode == "infer":
        return sgformer.optimize(model, compile=True)
    if case.backend == "compile":
        return torch.compile(model, dynamic=False)  # type: ignore[return-value]
    return model


def _exported_step(model: nn.Module, image: Tensor, case: Case) -> Callable[[], Any]:
    known = ("fp32", "bf16", "int8") if case.backend == "openvino" else ("fp32",)
    if case.mode == "train" or case.precision not in known or case.device != "cpu":
        raise Unsupported(f"{case.backend} is measured for inference in {', '.join(known)} on the CPU")
    runtime = require(case.backend, extra="bench")
    require("onnx", extra="bench")
    from sgformer.backends.traceable import traceable
    from sgformer.exporting.formats.onnx import onnx_session
    from sgformer.exporting.quiet import quiet

    if is_ours(case.model):
        model = traceable(model, "topk", fixed=True)  # what `sgformer export --image-size` writes
    file = io.BytesIO()
    with quiet(), torch.no_grad():
        torch.onnx.export(model, (image,), file, dynamo=False, input_names=["image"], opset_version=17)
    feed = {"image": image.numpy()}
    if case.precision == "int8":
        file = _quantized(file, feed)
    if case.backend == "openvino":
        core = runtime.Core()
        options = {  # the default is bfloat16 on processors that support it
            "INFERENCE_PRECISION_HINT": "bf16" if case.precision == "bf16" else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(core.read_model(file.getvalue(), b""), "CPU", options).create_infer_request()
        return lambda: torch.from_numpy(request.infer(feed)[0])
    session = onnx_session(file.getvalue())
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _quantized(file: io.BytesIO, feed: dict[str, Any]) -> io.BytesIO:
    """An ONNX file with its linear maps and convolutions in int8, calibrated on one input: only its speed matters."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = [feed]

        def get_next(self) -> Any:
            return self.inputs.pop() if self.inputs else None

    model = onnx.load_from_string(file.getvalue())
    constants = {tensor.name for tensor in model.graph.initializer}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8.onnx"
        quantize_static(
            model,
            out,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            nodes_to_quantize=[
                node.name
                for node in model.graph.node
                if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in constants
            ],
            weight_type=QuantType.QInt8,
        )
        return io.BytesIO(out.read_bytes())


def _plain_file() -> Path:
    """benchmarks/plain.py of this checkout or of the current folder: a baseline that the package does not ship."""
    for root in (Path(__file__).parents[3], Path.cwd()):
        if (root / "benchmarks" / "plain.py").is_file():
            return root / "benchmarks" / "plain.py"
    raise UserError("'plain' is benchmarks/plain.py of the source checkout: run it there")


def _load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"sgformer_bench_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
