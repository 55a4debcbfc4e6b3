"""Sizes that an exporter does not know: one graph for all of them, and no question that only the example answers."""

import pytest
import torch
import torch.nn as nn

import sgformer
from sgformer import ops
from sgformer.models.backbone import attend_scale, pad_grid
from sgformer.models.config import Region
from sgformer.models.layers import resize_table
from sgformer.models.significance import AGGREGATIONS
from sgformer.ops.sizes import ceil_to, known
from sgformer.ops.windows import merge_heads, partition_heads

Dim = torch.export.Dim


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def windows(x):  # (B, H, W, C), in windows of 4 x 4, and back
    heads = partition_heads(x, (4, 4), 2)
    return merge_heads(heads.softmax(-1), (4, 4), tuple(x.shape[1:3])), ops.partition(x, (4, 4))


def scale(is_global):
    def run(x):
        q, kv = x, pad_grid(x, 2)[:, ::2, ::2].contiguous()
        return attend_scale(q, torch.cat([kv, kv.flip(-1)], -1), 2, 2, 3, is_global)

    return run


def regions(x):  # (B, H, W, C)
    tokens = x.flatten(1, 2)
    groups = ops.group_tokens(ops.sort_tokens(tokens[..., 0]), [0.25, 0.5, 0.25], [4, 2, 1])
    return torch.cat([members.mean(2) for members in ops.gather_groups(tokens, groups)], 1)


def position(x):
    return x + resize_table(torch.arange(12 * 12 * 8.0).view(12, 12, 8).sin(), tuple(x.shape[1:3]))


@pytest.mark.parametrize("function", [windows, scale(True), scale(False), regions, position])
def test_one_graph_serves_all_sizes(function):
    torch.manual_seed(0)
    module = Function(function)
    # The example is the special case: whole windows, the table's own grid, regions that divide.
    sizes = dict.fromkeys(range(3), Dim.DYNAMIC)
    example = (torch.randn(2, 12, 12, 8),)
    program = torch.export.export(module, example, dynamic_shapes=((sizes,),), strict=False).module()
    for B, H, W in ((2, 12, 12), (3, 13, 17), (2, 20, 9)):
        x = torch.randn(B, H, W, 8)
        torch.testing.assert_close(program(x), function(x), atol=1e-5, rtol=1e-5)


def test_what_is_known_of_plain_numbers():
    assert known(3 == 3) and not known(3 == 4)
    assert [ceil_to(n, 4) for n in (1, 4, 5)] == [4, 4, 8]


def test_regions_end_at_exact_halves_rounded_up():
    assert ops.region_lengths(15, (0.6, 0.3, 0.1)) == [9, 5, 1]  # 13.5, which is 13.499999999999998 in floating point
    assert ops.region_lengths(45, (0.3, 0.4, 0.3)) == [14, 18, 13]


@pytest.mark.parametrize("aggregation", ["linear", "mean", "weighted"])
def test_compiled_for_all_sizes_regions_are_those_of_each_size(aggregation):
    torch._dynamo.reset()
    pool = AGGREGATIONS[aggregation]([Region(0.6, 8), Region(0.3, 4), Region(0.1, 1)])
    seen = []

    def keep(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(pool, dynamic=True, backend=keep)
    for batch, tokens in ((2, 100), (3, 135), (2, 77)):
        x, significance = torch.randn(batch, tokens, 8), torch.randn(batch, tokens)
        for got, expected in zip(compiled(x, significance)[1], pool(x, significance)[1], strict=True):
            assert torch.equal(got, expected)
    sizes = [node.meta["example_value"] for node in seen[0].graph.nodes if node.op == "placeholder"]
    assert len(seen) == 1 and not any(isinstance(size, torch.SymFloat) for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("options", [{}, {"aggregation": "weighted", "coarse": "global"}])
def test_the_bare_network_compiles_for_all_sizes(options, marked):
    """With a back end that runs graphs as they are; it is given few sizes and no long expressions made of them."""
    torch._dynamo.reset()
    symbols = []

    def keep(graph, inputs):
        values = [node.meta.get("example_value") for node in graph.graph.nodes]
        sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
        symbols.append({str(size) for size in sizes if isinstance(size, torch.SymInt)})
        return graph.forward

    model = sgformer.create_model("sgformer_n", num_classes=10, **options).double().eval()
    compiled = torch.compile(model, dynamic=None if marked else True, backend=keep)
    for shape in ((2, 3, 96, 128), (3, 3, 131, 64)):
        x = torch.randn(*shape, dtype=torch.float64)
        if marked:  # strictly: a size that becomes a number is an error
            torch._dynamo.mark_dynamic(x, (2, 3))
        gradients = []
        for network in (model, compiled):
            model.zero_grad()
            out = network(x)
            out.square().sum().backward()
            gradients.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert symbols and max(map(len, symbols)) <= 12  # with the stages in one graph, some hundred


@pytest.mark.slow
def test_the_bare_network_exports_with_free_sizes():
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=10).eval()
    sizes = {0: Dim("batch", min=2, max=64), 2: Dim("height", min=113, max=2048), 3: Dim("width", min=113, max=2048)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 224, 224),), dynamic_shapes=(sizes,), strict=False)
        for shape in ((2, 3, 224, 224), (3, 3, 256, 320), (2, 3, 131, 160)):
            x = torch.randn(*shape)
            torch.testing.assert_close(program.module()(x), model(x), atol=1e-4, rtol=1e-4)
