"""Self-guided attention on sound and text, beside a plain transformer of the same cost.

    python examples/sequences.py digits recordings/ --out digits
    python examples/sequences.py text TREC.train.all TREC.test.all --out questions

`recordings/` holds spoken digits as 7_jackson_32.wav (8 kHz, 16 bits, one channel), of which the networks get a frame
of 40 loudnesses every 5 ms; a text file has a line of label and words for each text. Three networks train with every
seed: `guided` (pairs of hybrid-scale and self-guided blocks), `uniform` (the same, but the ranking is left out: tokens
are pooled in their order) and `plain` (torch's transformer layers, their MLPs as wide as makes the cost equal). OUT
gets the table and a picture of which samples or words got the tokens.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
import wave
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sgformer import SGFormer1d, Stem1d

NETWORKS = ("guided", "uniform", "plain")
RATE, WINDOW, HOP, MELS = 8000, 256, 40, 40  # of sound: samples a second, samples of a frame, between frames; bands


# -- data -------------------------------------------------------------------------------------------------------------


@dataclass
class Sequences:
    """Sequences of unequal lengths, their classes, and what to show of each: samples (M,), or words.

    The values are frames of sound, (N, MELS) float32, or numbers of words, (N,) int64.
    """

    values: list[Tensor]
    labels: list[int]
    shown: list[Any]

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N) padded with zeros, the lengths (B,), the classes (B,)."""
        values = [self.values[i] for i in indices]
        lengths = torch.tensor([len(v) for v in values])
        return (
            nn.utils.rnn.pad_sequence(values, batch_first=True),
            lengths,
            torch.tensor([self.labels[i] for i in indices]),
        )


@dataclass
class Data:
    train: Sequences
    val: Sequences
    test: Sequences
    classes: list[str]
    vocabulary: int = 0


def mel_filters() -> Tensor:
    """(WINDOW / 2 + 1, MELS): triangles of equal width on the mel scale, from 0 to half the rate."""

    def mels(hertz: Tensor) -> Tensor:
        return 2595 * torch.log10(1 + hertz / 700)

    edges = torch.linspace(0, mels(torch.tensor(RATE / 2)).item(), MELS + 2)
    at = mels(torch.linspace(0, RATE / 2, WINDOW // 2 + 1))[:, None]
    rising, falling = (at - edges[:-2]) / (edges[1:-1] - edges[:-2]), (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def log_mels(samples: Tensor) -> Tensor:
    """(M,) -> (M // HOP + 1, MELS): how loud each band of frequencies is, every HOP samples."""
    spectrum = torch.stft(
        samples, WINDOW, HOP, window=torch.hann_window(WINDOW), pad_mode="constant", return_complex=True
    )
    return (spectrum.abs().square().T @ mel_filters() + 1e-4).log()


def spoken_digits(folder: Path) -> Data:
    """The data set's own split: recordings 0 to 4 of every digit and speaker are the test. 5 to 9 are kept aside."""
    parts: dict[str, list[tuple[Tensor, int, Tensor]]] = {"train": [], "val": [], "test": []}
    for file in sorted(folder.glob("*.wav")):
        digit, _, number = file.stem.split("_")
        with wave.open(str(file)) as sound:
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2").astype(np.float32)
        scaled = torch.from_numpy(samples / max(1.0, float(np.abs(samples).max())))
        part = "test" if int(number) < 5 else "val" if int(number) < 10 else "train"
        parts[part].append((log_mels(scaled), int(digit), scaled))
    if not all(parts.values()):
        raise SystemExit(f"{folder}: expected spoken digits such as 7_jackson_32.wav, numbered from 0 to at least 10")
    learned = torch.cat([frames for frames, _, _ in parts["train"]])
    mean, std = learned.mean(0), learned.std(0)
    made = {
        name: Sequences([(frames - mean) / std for frames, _, _ in rows], [r[1] for r in rows], [r[2] for r in rows])
        for name, rows in parts.items()
    }
    return Data(made["train"], made["val"], made["test"], [str(n) for n in range(10)])


def louder_and_masked(x: Tensor) -> Tensor:
    """Frames (B, N, MELS) louder or quieter, and without up to eight neighbouring bands (Park et al., 2019)."""
    first = torch.randint(MELS, (len(x), 1))
    band = torch.arange(MELS)
    masked = (band >= first) & (band < first + torch.randint(9, (len(x), 1)))
    return (x + 0.3 * torch.randn(len(x), 1, 1)).masked_fill(masked[:, None], 0)


def texts(train: Path, test: Path, val: Path | None) -> Data:
    """Lines of label and words; without VAL every tenth text of TRAIN is kept aside. Words seen once are unknown."""

    def lines(file: Path) -> list[tuple[int, list[str]]]:
        rows = [line.split() for line in file.read_text(encoding="latin-1").splitlines()]
        return [(int(row[0]), row[1:]) for row in rows if len(row) > 1]

    learned, tested = lines(train), lines(test)
    aside = lines(val) if val else learned[::10]
    learned = learned if val else [row for i, row in enumerate(learned) if i % 10]
    counts = Counter(word.lower() for _, words in learned for word in words)
    numbers = {word: i for i, word in enumerate(sorted(w for w, n in counts.items() if n > 1), start=1)}  # 0: unknown

    def made(rows: list[tuple[int, list[str]]]) -> Sequences:
        values = [torch.tensor([numbers.get(word.lower(), 0) for word in words]) for _, words in rows]
        return Sequences(values, [label for label, _ in rows], [words for _, words in rows])

    classes = [str(i) for i in range(1 + max(label for label, _ in learned))]
    return Data(made(learned), made(aside), made(tested), classes, len(numbers) + 1)


# -- networks ---------------------------------------------------------------------------------------------------------


class PlainTransformer(nn.Module):
    """torch's encoder layers after sine and cosine positions, the mean over the tokens, a linear classifier."""

    def __init__(self, dim: int, layers: int, num_classes: int, hidden: int, dropout: float):
        super().__init__()
        layer = nn.TransformerEncoderLayer(dim, 4, hidden, dropout, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.drop, self.head = nn.Dropout(dropout), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        _, N, C = x.shape
        angles = torch.arange(N)[:, None] * 10000 ** -(torch.arange(0, C, 2) / C)
        padding = torch.arange(N) >= lengths[:, None]
        x = self.layers(x + torch.cat([angles.sin(), angles.cos()], 1), src_key_padding_mask=padding)
        pooled = x.masked_fill(padding[..., None], 0).sum(1) / lengths[:, None]
        return self.head(self.drop(pooled))


class Classifier(nn.Module):
    """Tokens of frames or of words, and a network on them."""

    def __init__(self, data: Data, network: str, hidden: int = 0, dim: int = 64):
        super().__init__()
        self.stem = None if data.vocabulary else Stem1d(MELS, dim, (1, 1))
        self.words = nn.Embedding(data.vocabulary, dim) if data.vocabulary else None
        dropout = 0.3 if data.vocabulary else 0.1
        self.drop = nn.Dropout(dropout)
        self.body: nn.Module
        if network == "plain":
            self.body = PlainTransformer(dim, 4, len(data.classes), hidden, dropout)
        else:
            few = data.vocabulary > 0  # ten words, or a hundred tokens of sound
            self.body = SGFormer1d(
                dim,
                pairs=2,
                num_classes=len(data.classes),
                regions=((0.5, 4), (0.5, 1)) if few else ((0.5, 16), (0.5, 4)),
                reduction=4 if few else 8,
                window=8 if few else 16,
                significance="hybrid" if network == "guided" else "uniform",
                dropout=dropout,
            )

    def tokens(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        if self.words is not None:
            return self.drop(self.words(x)), lengths
        assert self.stem is not None
        x, shorter = self.stem(x, lengths)
        assert shorter is not None
        return x, shorter

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.body(*self.tokens(x, lengths))


def cost(network: Classifier, data: Data) -> float:
    """Multiply-accumulates of one sequence of median length, half of what torch counts."""
    median = sorted(range(len(data.train)), key=lambda i: len(data.train.values[i]))[len(data.train) // 2]
    x, lengths, _ = data.train.batch([median])
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH),
    ):
        network.train()(x, lengths)  # in evaluation torch's layers run as one operator, which is not counted
    return counter.get_total_flops() / 2


def build(data: Data, name: str) -> Classifier:
    """A network of a name; the plain one as costly as the guided one."""
    if name != "plain":
        return Classifier(data, name)
    aim = cost(Classifier(data, "guided"), data)
    state = torch.get_rng_state()
    hidden = min(range(16, 1024, 8), key=lambda width: abs(cost(Classifier(data, name, width), data) - aim))
    torch.set_rng_state(state)
    return Classifier(data, name, hidden)


# -- training ---------------------------------------------------------------------------------------------------------


def batches(data: Sequences, size: int, draw: np.random.Generator | None) -> Iterator[list[int]]:
    """Indices of batches; drawn ones hold sequences of about the same length, as 16 batches at a time are sorted."""
    if draw is None:
        order = sorted(range(len(data)), key=lambda i: len(data.values[i]))
        yield from (order[start : start + size] for start in range(0, len(order), size))
        return
    order = draw.permutation(len(data)).tolist()
    found = []
    for start in range(0, len(order), 16 * size):
        part = sorted(order[start : start + 16 * size], key=lambda i: len(data.values[i]))
        found += [part[i : i + size] for i in range(0, len(part), size)]
    for i in draw.permutation(len(found)):
        yield found[i]


def accuracy(network: Classifier, data: Sequences) -> float:
    """In per cent."""
    network.eval()
    right = 0
    with torch.no_grad():
        for indices in batches(data, 128, None):
            x, lengths, labels = data.batch(indices)
            right += int((network(x, lengths).argmax(1) == labels).sum())
    return 100 * right / len(data)


def fit(data: Data, name: str, seed: int, epochs: int, lr: float, size: int = 64) -> tuple[Classifier, float]:
    """Train a network, and the seconds that took. The rate rises over a tenth of the updates, then falls to 0."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    network = build(data, name)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05)
    total = epochs * sum(1 for _ in batches(data.train, size, np.random.default_rng(0)))
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 10 * (step + 1) / total) * 0.5 * (1 + math.cos(math.pi * step / total))
    )
    start = time.process_time()
    for _ in range(epochs):
        network.train()
        for indices in batches(data.train, size, draw):
            x, lengths, labels = data.train.batch(indices)
            if not data.vocabulary:
                x = louder_and_masked(x)
            loss = nn.functional.cross_entropy(network(x, lengths), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            shape.step()
    return network, time.process_time() - start


# -- pictures ---------------------------------------------------------------------------------------------------------


def spent(network: Classifier, values: Tensor) -> np.ndarray:
    """Key/value tokens per token of a sequence, (N,), the mean over pairs: 1 where every token has its own."""
    body = network.eval().body
    assert isinstance(body, SGFormer1d)
    with torch.no_grad():
        seen = body.inspect(*network.tokens(values[None], torch.tensor([len(values)])))
    maps = []
    for tokens in seen.tokens:
        assert isinstance(tokens, list)
        labels = tokens[0].token_map()[0]
        maps.append(1 / torch.bincount(labels)[labels])
    return torch.stack(maps).mean(0).numpy()


def draw(network: Classifier, data: Data, file: Path, rows: int = 6) -> None:
    """The first test sequences of different classes: the waveform or the words, coloured by the tokens they got."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection

    chosen = list({data.test.labels[i]: i for i in reversed(range(len(data.test)))}.values())
    chosen = (chosen + [i for i in range(len(data.test)) if i not in chosen])[:rows]
    high = 0.45 if data.vocabulary else 0.9
    figure, axes = plt.subplots(rows, 1, figsize=(10, high * rows + 0.8), constrained_layout=True, squeeze=False)
    scale = plt.Normalize(0, 1 if data.vocabulary else 0.25)  # the most that a token gets
    for axis, i in zip(axes[:, 0], sorted(chosen, key=lambda i: data.test.labels[i]), strict=True):
        values = data.test.values[i]
        share = spent(network, values)
        with torch.no_grad():
            answer = int(network(values[None], torch.tensor([len(values)])).argmax())
        said = f"{data.classes[answer]} ({data.classes[data.test.labels[i]]})"
        axis.set_ylabel(said, rotation=0, ha="right", va="center")
        axis.set_yticks([])
        if data.vocabulary:
            axis.axis("off")
            axis.text(0, 0.5, said, va="center", fontsize=10, color="0.4")
            at = 0.25
            for word, value in zip(data.test.shown[i], share, strict=True):
                box = {"facecolor": plt.cm.viridis(scale(value)), "edgecolor": "none", "boxstyle": "round,pad=.25"}
                text = axis.text(at, 0.5, word.replace("$", r"\$"), va="center", bbox=box, fontsize=10)
                text.set_color("black" if value > 0.5 else "white")
                figure.canvas.draw()
                wide = text.get_window_extent().transformed(axis.transAxes.inverted()).width
                at += wide + 0.016
        else:
            samples = data.test.shown[i].numpy()
            seconds = np.arange(len(samples)) / RATE
            points = np.stack([seconds, samples], 1)
            lines = LineCollection(np.stack([points[:-1], points[1:]], 1), cmap="viridis", norm=scale, linewidths=0.7)
            nearest = (np.arange(len(samples) - 1) + HOP // 2) // HOP
            lines.set_array(share[np.minimum(nearest, len(share) - 1)])
            axis.add_collection(lines)
            axis.set_xlim(0, seconds[-1])
            axis.set_ylim(-1.05, 1.05)
            axis.tick_params(labelsize=8)
    if not data.vocabulary:
        axes[-1, 0].set_xlabel("seconds")
    bar = figure.colorbar(plt.cm.ScalarMappable(scale, "viridis"), ax=axes[:, 0], shrink=0.8)
    bar.set_label("key/value tokens per token")
    figure.suptitle("Answer (truth), and where the tokens went", fontsize=11)
    figure.savefig(file, dpi=120)
    plt.close(figure)


# -- the comparison ---------------------------------------------------------------------------------------------------


def compare(data: Data, out: Path, seeds: Sequence[int], epochs: int, lr: float, networks: Sequence[str]) -> list[dict]:
    """Train every network with every seed; a row for each, with accuracy on what was kept aside and on the test."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for seed in seeds:
        for name in networks:
            network, seconds = fit(data, name, seed, epochs, lr)
            rows.append(
                {
                    "network": name,
                    "seed": seed,
                    "val": round(accuracy(network, data.val), 2),
                    "test": round(accuracy(network, data.test), 2),
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "mega_macs": round(cost(network, data) / 1e6, 2),
                    "seconds": round(seconds),
                }
            )
            print(" ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            if name == "guided" and seed == seeds[0]:
                draw(network, data, out / "tokens.png")
    with open(out / "runs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows


def table(rows: Sequence[dict]) -> str:
    """Mean and standard deviation over the seeds, in Markdown."""
    lines = [
        "| Network | Parameters | MACs, median length | Test accuracy | Kept aside | Training |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == name]

        def spread(key: str, own: list[dict] = own) -> str:
            values = [row[key] for row in own]
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            return f"{statistics.mean(values):.1f}{deviation} %"

        cells = [name, f"{own[0]['parameters']:,}", f"{own[0]['mega_macs']} M", spread("test"), spread("val")]
        cells.append(f"{statistics.mean(row['seconds'] for row in own):.0f} s")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("kind", choices=("digits", "text"))
    options.add_argument("data", type=Path, nargs="+", help="the folder of recordings, or TRAIN TEST [VAL]")
    options.add_argument("--names", nargs="+", help="of the classes of texts, to show; by default their numbers")
    options.add_argument("--out", type=Path, required=True, help="a folder for the table and the picture")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--lr", type=float, default=2e-3)
    given = options.parse_args()
    if given.kind == "digits":
        data = spoken_digits(given.data[0])
    elif len(given.data) in (2, 3):
        data = texts(given.data[0], given.data[1], given.data[2] if len(given.data) == 3 else None)
    else:
        options.error("text takes TRAIN TEST, or TRAIN TEST VAL")
    if given.names and len(given.names) != len(data.classes):
        options.error(f"--names: {len(given.names)} names for {len(data.classes)} classes")
    data.classes = given.names or data.classes
    rows = compare(data, given.out, given.seeds, given.epochs, given.lr, given.networks)
    (given.out / "table.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
