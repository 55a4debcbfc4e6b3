"""On a CUDA device: the same numbers as on the CPU, and half precision that stays finite."""

import pytest
import torch

import sgformer

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
