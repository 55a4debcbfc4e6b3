"""On a CUDA device: the same numbers as on the CPU, half precision that stays finite, Triton's kernels as torch."""

import copy

import pytest
import torch

import sgformer
from sgformer import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("size", [(224, 224), (97, 150)])
@pytest.mark.parametrize("coarse", ["global", "window"])
def test_forward_and_backward_equal_the_cpu_s(size, coarse):
    model = sgformer.create_model("sgformer_n", num_classes=10, coarse=coarse, dtype=torch.float64)
    x = torch.randn(2, 3, *size, dtype=torch.float64)

    def run(device):
        model.to(device).zero_grad()
        logits = model(x.to(device))
        logits.square().sum().backward()
        return logits.detach().cpu(), [p.grad.cpu().clone() for p in model.parameters()]

    (logits, gradients), (logits_there, gradients_there) = run("cpu"), run("cuda")
    torch.testing.assert_close(logits_there, logits, rtol=1e-8, atol=1e-10)
    for here, there in zip(gradients, gradients_there, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype):
    model = sgformer.create_model("sgformer_n", num_classes=10).cuda().train()
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    with torch.autocast("cuda", dtype):
        seen = model.inspect(torch.randn(4, 3, 224, 224, device="cuda"))
    assert all(s.dtype == torch.float32 and s.isfinite().all() for s in seen.significance.values())
    scaler.scale(seen.logits.float().square().mean()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_deterministic_training_gives_the_same_bits(tmp_path):
    pytest.importorskip("lightning")
    from photos import QUICK, make_photos

    from sgformer.models.checkpoint import read_safetensors
    from sgformer.tasks.api import train

    data, ends = make_photos(tmp_path / "photos"), []
    try:
        for name in ("one", "other"):
            settings = {**QUICK, "device": "cuda", "devices": 1, "deterministic": True, "precision": "bf16"}
            run = train("classify", data=str(data), run=str(tmp_path / name), **settings).path
            ends.append(read_safetensors(run / "last.safetensors")[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# Images or windows, heads, queries, keys, channels; whether tokens are padded. Every line is compiled anew: few do.
SHAPES = [
    (64, 1, 49, 49, 32, False),  # S at 224 pixels: windows of stage 1
    (2, 1, 3136, 49, 32, False),  # and coarse heads
    (70_000, 1, 5, 9, 32, True),  # more windows than a GPU's grid has in its second dimension
    (2, 2, 4096, 1024, 24, False),  # many pixels: two passes
    (1, 3, 333, 77, 64, True),
]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)), (SHAPES[3], torch.float16)],
    ids=str,
)
def test_triton_attention_equals_torch_s_in_float64(shape, dtype):
    pytest.importorskip("triton")
    from sgformer.backends.triton import functions

    B, h, N, M, d, padded = shape
    q, k, v = (torch.randn(B, n, h * d, device="cuda").to(dtype) for n in (N, M, M))
    valid, real = (torch.rand(B, n, device="cuda") > 0.4 if padded else None for n in (M, N))
    if padded:
        valid[:, M // 2] = True
    grad = torch.randn(B, h, N, d, device="cuda").to(dtype)

    def run(attention, *tensors):
        heads = [ops.split_heads(t.detach().requires_grad_(), h) for t in tensors]
        out, received = attention(*heads, valid, real)
        return [out, received, *torch.autograd.grad(out, heads, grad.to(out.dtype))]

    fast = run(functions.attention_and_received, q, k, v)
    slow = run(ops.attention_and_received, q.double(), k.double(), v.double())
    # Three products of 10 bits are 21; half precision rounds weights and results.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for a, b in zip(fast, slow, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm() + 1e-6
    again = run(functions.attention_and_received, q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(again, fast, strict=True))


def test_triton_attention_never_holds_the_matrix():
    pytest.importorskip("triton")
    from sgformer.backends.triton import functions

    q, k = (torch.randn(1, 2, n, 32, device="cuda", requires_grad=True) for n in (65536, 4096))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = functions.attention_and_received(q, k, k)
    out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * 65536 * 4096 * 4 / 8  # of one such matrix, an eighth


@pytest.mark.parametrize("size", [(224, 224), (97, 150), (512, 512)])
@pytest.mark.parametrize(
    "options", [{}, {"aggregation": "merge"}, {"aggregation": "mean", "coarse": "window"}], ids=str
)
def test_networks_with_triton_compute_the_same(size, options):
    """Up to what differs by rounding: of two tokens that rank almost equally, the other may come first."""
    pytest.importorskip("triton")
    model = sgformer.create_model("sgformer_n", num_classes=10, **options).cuda().eval()  # without drop path
    with torch.no_grad():
        for parameter in model.parameters():  # fresh weights attend to all alike, and most tokens rank almost equally
            parameter.add_(0.05 * torch.randn_like(parameter))
    fast = sgformer.accelerate(copy.deepcopy(model), triton=True)
    image = torch.randn(2, 3, *size, device="cuda")

    def run(network):
        network.zero_grad()
        seen = network.inspect(image)
        seen.logits.square().sum().backward()
        return seen, [p.grad for p in network.parameters() if p.grad is not None]

    (seen, gradients), (expected, expected_gradients) = run(fast), run(model)
    first = seen.significance["1.0"], expected.significance["1.0"]
    torch.testing.assert_close(*first, rtol=1e-4, atol=1e-6)
    assert (seen.logits - expected.logits).norm() < 2e-2 * expected.logits.norm()
    norms = [torch.stack([g.norm() for g in found]) for found in (gradients, expected_gradients)]
    assert (norms[0] - norms[1]).norm() < 2e-2 * norms[1].norm()
    with torch.no_grad():
        logits = sgformer.optimize(model, triton=True)(image)
        assert (logits - expected.logits).norm() < 2e-2 * expected.logits.norm()
        with torch.autocast("cuda", torch.bfloat16):
            assert fast(image).isfinite().all()
