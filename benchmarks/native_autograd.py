"""What asking costs: the probes of an accelerated block at every call, and torch.library.custom_op in their place.

python benchmarks/native_autograd.py --threads 1

Three ways to reach the same kernels:

* probes: as built. Every call asks whether kernels can serve here, then applies an autograd function;
* bare: the autograd function alone, which asks nothing;
* custom op: the same forward and backward as an operator of torch's dispatcher, registered with ``register_autograd``
  and a fake implementation. It need not ask about tracing, compiling, function transforms and modes that watch
  operations, as the dispatcher tells those; what remains to be asked are dtype, device, autocast and the module's
  parts: ``custom op, asking`` asks, ``custom op`` does not.

docs/notes/native_autograd.md has the figures.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

import sgformer
from sgformer.backends import native_autograd
from sgformer.backends.eligibility import plain, readable
from sgformer.backends.native_autograd import EAGER
from sgformer.backends.native_convolutions import ChainFunction
from sgformer.backends.native_functions import GuidedFunction, HybridFunction, MlpFunction, PlainFunction


class Context:
    """What stands for autograd's context in a function's forward or backward."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


def custom_op(function: type[Function]) -> Callable[..., Any]:
    """An operator of torch that computes what ``function.apply`` does.

    An operator has no context: what backward needs, but is neither input nor result, is among its results. Its schema
    has no tuples of options either, so that each call's are kept here under a number.
    """
    calls: dict[int, Any] = {}
    operators: dict[int, Callable[..., Any]] = {}
    number = iter(range(1 << 62))

    def compute(*inputs: Any) -> Any:
        """The results and, after them, what is saved for backward and is no input."""
        *tensors, key = inputs
        made, kept = calls[key], Context()
        out = function.forward(kept, *(fill(argument, tensors) for argument in made["arguments"]))
        outputs = list(out) if isinstance(out, tuple) else [out]
        known = {id(t): i for i, t in enumerate(tensors)}
        saved: list[Any] = []
        made["results"] = len(outputs)
        for t in kept.saved_tensors:
            if t is None or id(t) in known:
                saved.append(None if t is None else known[id(t)])
            else:
                saved.append(len(tensors) + len(outputs))
                outputs.append(t)
        made["saved"], made["context"] = saved, kept
        return tuple(outputs)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, key = inputs
        ctx.made = made = calls.pop(key)
        everything = [*tensors, *output]
        ctx.save_for_backward(*(None if i is None else everything[i] for i in made["saved"]))
        ctx.set_materialize_grads(False)
        ctx.inputs = len(tensors)

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        kept = ctx.made["context"]
        kept.saved_tensors, kept.needs_input_grad = ctx.saved_tensors, ctx.made["needs"]
        found = function.backward(kept, *grads[: ctx.made["results"]])
        given: list[Tensor | None] = [None] * (ctx.inputs + 1)
        for argument, gradient in zip(ctx.made["arguments"], found, strict=True):
            if type(argument) is Place:
                given[argument[1]] = gradient
        return tuple(given)

    def operator(tensors: list[Tensor], key: int) -> Callable[..., Any]:
        """One for so many tensors; how many results it has, a first call tells."""
        outputs = len(compute(*tensors, key))
        names = ", ".join(f"Tensor t{i}" for i in range(len(tensors)))
        op = torch.library.custom_op(
            f"sgformer_bench::{function.__name__.lower()}_{len(tensors)}",
            compute,
            mutates_args=(),
            schema=f"({names}, int key) -> ({', '.join(['Tensor'] * outputs)})",
        )
        op.register_fake(lambda *inputs: tuple(torch.empty_like(inputs[0]) for _ in range(outputs)))
        op.register_autograd(backward, setup_context=setup_context)
        return op

    def apply(*arguments: Any) -> Any:
        tensors: list[Tensor] = []
        key = next(number)

        def take(a: Any) -> Any:
            if isinstance(a, Tensor):
                tensors.append(a)
                return Place(("tensor", len(tensors) - 1))
            return [take(x) for x in a] if isinstance(a, list) else a

        placed = [take(a) for a in arguments]
        made = calls[key] = {
            "arguments": placed,
            "needs": [isinstance(a, Tensor) and a.requires_grad for a in arguments],
        }
        if len(tensors) not in operators:
            operators[len(tensors)] = operator(tensors, key)
        out = operators[len(tensors)](*tensors, key)[: made["results"]]
        calls.pop(key, None)  # where nothing needs a gradient
        return out[0] if len(out) == 1 else out

    return apply


class Place(tuple[str, int]):
    """Where among an operator's tensors an argument is."""


def fill(argument: Any, tensors: list[Tensor]) -> Any:
    """The argument with tensors in their places."""
    if type(argument) is Place:
        return tensors[argument[1]]
    return [fill(a, tensors) for a in argument] if isinstance(argument, list) else argument


FUNCTIONS: list[Any] = [HybridFunction, GuidedFunction, PlainFunction, MlpFunction, ChainFunction]


def use(way: str, originals: dict[str, Any], operators: dict[str, Any]) -> None:
    """Let all accelerated networks take this way."""
    for function in FUNCTIONS:
        kept = originals[function.__name__]
        function.apply = operators[function.__name__] if way.startswith("custom op") else kept
    native_autograd._served = {"probes": originals["_served"], "custom op, asking": ask}.get(way, lambda x, parts: True)


def ask(x: Tensor, parts: Any) -> bool:
    """What no dispatcher can answer."""
    return (
        plain(x)
        and not torch.is_autocast_enabled("cpu")
        and not any(getattr(native_autograd._modules, f"_global_{hooks}") for hooks in native_autograd.HOOKS)
        and all(readable(part, kind) for part, kind in parts.items())
    )


class Nothing(Function):
    """The least that an autograd function can take."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient,) * len(ctx.saved_tensors)


def empty_operator() -> Callable[..., Tensor]:
    """The least that an operator can take, written without any adapter."""

    @torch.library.custom_op("sgformer_bench::nothing", mutates_args=())
    def nothing(a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor, g: Tensor, h: Tensor) -> Tensor:
        return torch.empty_like(a)

    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (gradient,) * len(ctx.saved_tensors)

    nothing.register_fake(lambda a, *others: torch.empty_like(a))
    nothing.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    return nothing


WAYS = ("probes", "bare", "custom op, asking", "custom op")


def measure(calls: dict[str, Callable[[], object]], before: Callable[[str], None], rounds: int, times: int) -> None:
    """Medians, quartiles and the median ratio to the first, of interleaved rounds of so many calls each.

    Time is the processor's where there is one thread: that does not run while others have the core.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seen: dict[str, list[float]] = {way: [] for way in calls}
    for way, call in calls.items():
        before(way)
        call()
    for i in range(rounds):
        for way in list(calls)[:: 1 if i % 2 else -1]:
            before(way)
            start = clock()
            for _ in range(times):
                calls[way]()
            seen[way].append((clock() - start) * 1e6 / times)
    first = seen[next(iter(calls))]
    for way, spent in seen.items():
        low, median, high = statistics.quantiles(spent, n=4)
        ratio = statistics.median(a / b for a, b in zip(spent, first, strict=True))
        print(f"  {way:18} {median:10.1f} us ({low:.1f} to {high:.1f}), {ratio:.3f} times the first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=41)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    originals = {function.__name__: function.apply for function in FUNCTIONS}
    originals["_served"] = native_autograd._served
    operators = {function.__name__: custom_op(function) for function in FUNCTIONS}
    torch.manual_seed(0)
    model = sgformer.create_model("sgformer_n", num_classes=10, drop_path_rate=0.0).train()
    sgformer.accelerate(model)

    def prepare(way: str) -> None:
        use(way, originals, operators)

    prepare("probes")
    x = torch.randn(2, 3, 64, 64)
    expected = gradients(copy.deepcopy(model), x)
    for way in WAYS[1:]:
        prepare(way)
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, x), expected, strict=True)), way

    print(f"torch {torch.__version__}, {args.threads} threads. Nothing computed of 8 tensors, forward:")
    nothing = {"autograd function": Nothing.apply, "custom op": empty_operator()}
    tensors = [torch.ones(1, requires_grad=True) for _ in range(8)]
    of_nothing = {name: lambda call=call: call(*tensors) for name, call in nothing.items()}
    measure(of_nothing, lambda way: None, args.rounds, 500)
    print("forward and backward:")
    of_nothing = {name: lambda call=call: call(*tensors).backward() for name, call in nothing.items()}
    measure(of_nothing, lambda way: None, args.rounds, 200)
    block = next(m for stage in model.stages for m in stage.blocks if type(m) is native_autograd.FastPlain)
    tiny = torch.randn(1, 2, 2, block.norm1.normalized_shape[0], requires_grad=True)
    print("Plain block of N, 2 x 2 tokens, forward:")
    measure(dict.fromkeys(WAYS, lambda: block(tiny)), prepare, args.rounds, 50)
    print("forward and backward:")
    measure(dict.fromkeys(WAYS, lambda: block(tiny).sum().backward()), prepare, args.rounds, 20)
    served = originals["_served"]
    parts = {block.norm2: torch.nn.LayerNorm, block.mlp: EAGER.get(type(block.mlp), type(block.mlp))}
    print("all probes of the MLP half, alone, and those that stay with an operator:")
    questions = {"probes": lambda: served(tiny, parts), "asking": lambda: ask(tiny, parts)}
    measure(questions, lambda way: None, args.rounds, 500)
    for batch in (8, 64):
        images, classes = torch.randn(batch, 3, 64, 64), torch.randint(10, (batch,))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(images: Tensor = images, classes: Tensor = classes, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), classes).backward()
            optimizer.step()

        print(f"a training step of N at 64 pixels, batch {batch}:")
        measure(dict.fromkeys(WAYS, step), prepare, args.rounds if batch == 8 else max(9, args.rounds // 4), 1)


def gradients(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


if __name__ == "__main__":
    main()
