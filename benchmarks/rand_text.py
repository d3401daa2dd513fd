"""`python -m benchmarks.rand_text`: RAND's second claim, 4-bit weights on a sequence task, beside LSQ and the STE.

A small Transformer predicts the next character of the Python language reference, which Python itself ships
(`pydoc_data.topics`). It is trained in float once; from there each arm trains the same number of steps on the same
batches, every linear layer's weight quantized, activations in float. The loop is torch's own: prepare, calibrate,
set_progress. Each finished run is a line of JSON and is not run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, ClassVar, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qtemper
from qtemper.methods.rand import RAND, NormGrid
from qtemper.methods.ste import StraightThrough
from qtemper.policy import Granularity
from qtemper.quantizer import Grid, Method, QuantSpec, Rounding, TensorKind
from qtemper.run import environment

CONTEXT = 128
LATER = ("bits", "steps", "lr", "quantizer_lr")
BITS = (8, 6, 5, 4, 3)
RECORDED = ("torch", "python", "cpu_flags", "threads", "gpu", "commit")


def corpus() -> str:
    """All topics by name; a paragraph that several of them share, only once, so that none is on both sides."""
    paragraphs = (part for name in sorted(topics) for part in topics[name].split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def split(text: str) -> tuple[Tensor, Tensor, int]:
    """Training part and last tenth as character numbers, and the size of the alphabet."""
    alphabet = sorted(set(text))
    number = {character: i for i, character in enumerate(alphabet)}
    data = torch.tensor([number[character] for character in text])
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:], len(alphabet)


@final
class Block(nn.Module):
    """Causal attention and a feed-forward layer, each after a norm and beside a residual path."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`: (batch, length, width)."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return result


@final
class TextModel(nn.Module):
    """A Transformer decoder over characters.

    Args:
        characters: size of the alphabet.
        width: of the residual path.
        depth: number of blocks.
        heads: of each attention.
    """

    def __init__(self, characters: int, *, width: int, depth: int, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next character; (batch, length) to (batch, length, characters)."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        result: Tensor = self.head(self.norm(self.blocks(x)))
        return result


@final
@dataclass(frozen=True)
class OutlierSTE(Method):
    """RAND's grid with straight-through rounding: what its noise and its gradient of the scale are compared with."""

    name: ClassVar[str] = "outlier_ste"
    scale_gradient: bool = False

    def grid(self, kind: TensorKind, spec: QuantSpec, num_channels: int) -> Grid:
        """Levels from the largest weight."""
        return NormGrid(spec, num_channels, scale_gradient=self.scale_gradient)

    def rounding(self, kind: TensorKind, spec: QuantSpec) -> Rounding:
        """Straight through."""
        return StraightThrough()


METHODS: dict[str, Method | None] = {
    "float": None,
    "ste": qtemper.get_method("ste"),
    "ste max": OutlierSTE(),
    "ste max +gradient": OutlierSTE(scale_gradient=True),
    "lsq": qtemper.get_method("lsq"),
    "rand max": RAND(),
    "rand max -gradient": RAND(scale_gradient=False),
    "rand norm": RAND(mode="norm"),
}
ARMS = (
    "float", "ste / tensor", "ste max / tensor", "lsq / tensor", "rand max / tensor", "rand norm / tensor",
    "rand max -gradient / tensor", "rand max / channel", "ste max / channel", "lsq / channel", "ste / channel",
    "ste max +gradient / tensor",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything of a run but its arm and seed."""

    bits: int = 4
    width: int = 128
    depth: int = 3
    batch: int = 16
    float_steps: int = 1500
    float_lr: float = 2e-3
    steps: int = 200
    lr: float = 1e-3
    quantizer_lr: float = 1e-4
    weight_decay: float = 0.01


def policy(bits: int, granularity: str) -> qtemper.BitPolicy:
    """All linear layers' weights at `bits`."""
    per: Granularity = "channel" if granularity == "channel" else "tensor"
    return qtemper.BitPolicy(bits, 32, "same", rules=(qtemper.Rule("*", weight_granularity=per),))


def windows(data: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Random pieces of the text, (batch, CONTEXT + 1)."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(data) - CONTEXT, (batch, 1), generator=generator)
        yield data[starts + torch.arange(CONTEXT + 1)]


def loss_of(model: nn.Module, pieces: Tensor) -> Tensor:
    """Mean cross-entropy in nats."""
    return nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def bits_per_character(model: nn.Module, data: Tensor) -> float:
    """On the whole of `data`, in windows that follow each other; eval mode."""
    model.eval()
    pieces = data[: (len(data) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    with torch.no_grad():
        losses = [loss_of(model, part).item() * len(part) for part in torch.split(pieces, 64)]
    return sum(losses) / len(pieces) / math.log(2)


def train(model: nn.Module, data: Tensor, settings: Settings, steps: int, lr: float, seed: int) -> float:
    """AdamW, a tenth of warm-up, then cosine to zero; returns the last fifth's mean loss in bits per character."""
    groups = qtemper.param_groups(
        model, lr=lr, weight_decay=settings.weight_decay, quantizer_lr=min(lr, settings.quantizer_lr)
    )
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    rates = [group["lr"] for group in optimizer.param_groups]
    prepared = any(True for _ in qtemper.quantizers(model))
    losses = []
    model.train()
    for step, pieces in enumerate(windows(data, settings.batch, steps, seed)):
        progress = step / steps
        factor = min(10 * (step + 1) / steps, 0.5 + 0.5 * math.cos(math.pi * progress))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        if prepared:
            qtemper.set_progress(model, progress)
        loss = loss_of(model, pieces)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return statistics.fmean(losses[-max(1, steps // 5) :]) / math.log(2)


@final
class Study:
    """The corpus, the float network and the runs.

    Args:
        settings: of all runs.
        home: directory of the float network.
    """

    def __init__(self, settings: Settings, home: Path) -> None:
        self.settings = settings
        text = corpus()
        self.text_hash = hashlib.sha256(text.encode()).hexdigest()
        self.training, self.held_out, self.characters = split(text)
        self.calibration = [next(windows(self.training, 64, 1, seed=0))[:, :-1]]
        # Two studies that differ in what follows start from the same float network.
        shared = {name: value for name, value in settings.__dict__.items() if name not in LATER}
        key = hashlib.sha256(f"{self.text_hash}{shared}".encode()).hexdigest()[:12]
        path = home / f"float-{key}.safetensors"
        self.float_model = self.network()
        if not path.exists():
            train(self.float_model, self.training, settings, settings.float_steps, settings.float_lr, seed=1000)
            home.mkdir(parents=True, exist_ok=True)
            save_file(self.float_model.state_dict(), path)
        self.float_model.load_state_dict(load_file(path))

    def network(self) -> TextModel:
        """The network, at its first weights."""
        torch.manual_seed(0)
        return TextModel(self.characters, width=self.settings.width, depth=self.settings.depth)

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Train one arm; what it reached on the held-out text, at its own bits and at others."""
        name, _, granularity = arm.partition(" / ")
        method, settings = METHODS[name], self.settings
        model = self.network()
        model.load_state_dict(self.float_model.state_dict())
        started = time.perf_counter()
        if method is not None:
            qtemper.prepare(model, method, policy(settings.bits, granularity), seed=seed)
            qtemper.calibrate(model, self.calibration)
        before = bits_per_character(model, self.held_out)
        train_bpc = train(model, self.training, settings, settings.steps, settings.lr, seed)
        seconds = time.perf_counter() - started
        other = {}
        for bits in BITS:  # a float network is quantized as the STE's grid would
            twin = qtemper.requantize(
                model, self.network(), method or "ste", policy(bits, granularity), self.calibration
            )
            other[str(bits)] = bits_per_character(twin, self.held_out)
        return {
            "before_bpc": before,
            "train_bpc": train_bpc,
            "bpc": bits_per_character(model, self.held_out),
            "bpc_at": other,
            "outliers": outliers(model),
            "seconds": round(seconds, 1),
        }


def outliers(model: nn.Module) -> float:
    """Largest weight over the standard deviation, mean over the linear layers."""
    state = qtemper.latent_state(model)
    weights = [state[f"{name}.weight"] for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return statistics.fmean(float(w.abs().max() / w.std()) for w in weights)


def table(lines: list[dict[str, Any]]) -> str:
    """Mean over the seeds of each arm."""
    rows = ["arm | n | bpc | sd | train | " + " | ".join(map(str, BITS)) + " | max/std"]
    for arm in dict.fromkeys(line["arm"] for line in lines):
        own = [line for line in lines if line["arm"] == arm]
        found = [line["bpc"] for line in own]
        spread = f"{statistics.stdev(found):.4f}" if len(found) > 1 else ""
        at = " | ".join(f"{statistics.fmean(line['bpc_at'][str(bits)] for line in own):.4f}" for bits in BITS)
        train_bpc, ratio = (statistics.fmean(line[key] for line in own) for key in ("train_bpc", "outliers"))
        rows.append(
            f"{arm} | {len(own)} | {statistics.fmean(found):.4f} | {spread} | {train_bpc:.4f} | {at} | {ratio:.1f}"
        )
    return "\n".join(rows)


def main() -> None:
    """Run what is missing, first seed of all arms first; print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=10**6, help="run at most so many, then stop")
    parser.add_argument("--home", type=Path, default=Path("runs/rand-text"), help="of the float network")
    parser.add_argument("--out", type=Path, default=Path("results/rand.jsonl"))
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    options = parser.parse_args()
    settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    study = Study(settings, options.home)
    about = {"experiment": "text", "settings": settings.__dict__, "corpus_sha256": study.text_hash}

    def finished() -> list[dict[str, Any]]:
        lines = options.out.read_text().splitlines() if options.out.exists() else []
        return [line for line in map(json.loads, lines) if {key: line.get(key) for key in about} == about]

    for seed in options.seeds:
        for arm in options.arms:
            if options.limit < 1 or any((line["arm"], line["seed"]) == (arm, seed) for line in finished()):
                continue
            options.limit -= 1
            found = environment(seed)
            line = {**about, "arm": arm, "seed": seed, **study.run(arm, seed), **{key: found[key] for key in RECORDED}}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{arm}, seed {seed}: {line['bpc']:.4f}", flush=True)
    print(table(finished()))


if __name__ == "__main__":
    main()
