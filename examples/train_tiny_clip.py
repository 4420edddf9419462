"""Train the tiny CLIP that ships with fastood, on a CPU, from four small image sets.

    python examples/train_tiny_clip.py train --data IMAGES --run RUN --minutes 95
    python examples/train_tiny_clip.py export --data IMAGES --run RUN --out fastood/models/tiny

``IMAGES`` holds ``cifar10_jpg.tar.gz``, ``clothing_cc0_96.tar``, ``mnist_10k.npz`` and
``notmnist_10k.npz``. The learning rate follows the share of ``--minutes`` that has passed, so the
run ends on time on any machine; ``--steps N`` makes it follow the step count instead, which is
repeatable. A checkpoint is written every few minutes and ``--resume`` continues from it.

What is kept out: the CIFAR-10 test split, the last 1,000 of a seeded permutation of MNIST and
notMNIST, the clothing photographs of ``validation/`` and ``test/``, and every photograph of a
clothing class outside ``fastood.demo.ID_CLASSES``.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastood.demo import ID_CLASSES

CONFIG: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 49408,
        "width": 128,
        "heads": 4,
        "layers": 3,
    },
}
SIZE = 64
CLOTHING_SIDE = 80  # kept a little larger than the model's 64 px, so that crops stay sharp
SPLIT_SEED = 20  # of the MNIST and notMNIST permutations; never change it after training

# Besides the first name, which the metrics use, a class is sometimes called by another one, so
# that those words get trained token rows too. No name of a near-OOD class appears here, except
# that "t-shirt" cannot be written without the token "shirt".
CIFAR_NAMES = {
    "airplane": ["airplane", "plane", "jet aircraft"],
    "automobile": ["automobile", "car"],
    "bird": ["bird", "small bird"],
    "cat": ["cat", "kitten"],
    "deer": ["deer", "stag"],
    "dog": ["dog", "puppy"],
    "frog": ["frog", "toad"],
    "horse": ["horse", "pony"],
    "ship": ["ship", "boat"],
    "truck": ["truck", "lorry"],
}
CLOTHING_NAMES = {
    "dress": ["dress", "gown"],
    "longsleeve": ["longsleeve", "long sleeve", "sweater"],
    "pants": ["pants", "trousers", "jeans"],
    "shoes": ["shoes", "pair of shoes", "sneakers"],
    "t-shirt": ["t-shirt", "tee"],
}
NUMBER_WORDS = "zero one two three four five six seven eight nine".split()
DIGIT_NAMES = {
    str(d): [f"digit {d}", f"handwritten digit {d}", f"number {w}"]
    for d, w in enumerate(NUMBER_WORDS)
}
LETTER_NAMES = {c: [f"letter {c}", f"printed letter {c}", f"character {c}"] for c in "ABCDEFGHIJ"}
NAMES = {
    "cifar10": CIFAR_NAMES,
    "clothing": {c: CLOTHING_NAMES[c] for c in ID_CLASSES},
    "mnist": DIGIT_NAMES,
    "notmnist": LETTER_NAMES,
}
TEMPLATES = [
    *("a photo of a {}", "a photo of a {}.", "a picture of a {}", "{}", "a {}", "an image of a {}"),
    *("a photo of the {}", "a blurry photo of a {}", "a photo of {}", "this is a photo of a {}"),
    *("a low resolution photo of a {}.", "a photo of a {}, a type of clothing."),
    *("a photo of a {}, a type of animal.", 'a photo of the number: "{}".'),
    *(t("{}") for t in SIMPLE_IMAGENET_TEMPLATES),
]
RARE_TEMPLATES = [t("{}") for t in OPENAI_IMAGENET_TEMPLATES]


@dataclass
class Set:
    """One image set in memory: uint8 pixels (N, 3, S, S) and labels into the joint class list."""

    name: str
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def class_table() -> tuple[list[list[str]], dict[str, range]]:
    """All classes of all sets in one list of name lists, and where each set's classes lie."""
    names: list[list[str]] = []
    where = {}
    for name, table in NAMES.items():
        where[name] = range(len(names), len(names) + len(table))
        names.extend(table.values())
    return names, where


def decode(data: bytes, side: int) -> Tensor:
    """Shorter side to ``side`` and the central square, as the model's own preprocessing does."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if min(image.size) != side:
        scale = side / min(image.size)
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    pixels = np.asarray(image.crop((left, top, left + side, top + side)))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def read_tar(path: Path, classes: list[str], side: int) -> dict[str, tuple[Tensor, Tensor]]:
    """``split/class/file`` pictures of the listed classes only, by split, labels 0..len-1."""
    rows: dict[str, list[tuple[str, Tensor, int]]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            parts = member.name.split("/")
            if not member.isfile() or len(parts) != 3 or parts[1] not in classes:
                continue
            stream = tar.extractfile(member)
            if stream is None:
                raise ValueError(f"{path}: {member.name} cannot be read")
            row = (member.name, decode(stream.read(), side), classes.index(parts[1]))
            rows.setdefault(parts[0], []).append(row)
    for split in rows.values():
        split.sort(key=lambda row: row[0])
    return {
        split: (torch.stack([r[1] for r in part]), torch.tensor([r[2] for r in part]))
        for split, part in rows.items()
    }


def read_npz(path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """9,000 training and 1,000 held-out glyphs, three equal channels."""
    with np.load(path, allow_pickle=False) as file:
        images = torch.from_numpy(file["images"])[:, None].expand(-1, 3, -1, -1).contiguous()
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(labels)))
    train, held_out = order[:9000], order[9000:]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def load_sets(data: Path, run: Path) -> dict[str, Set]:
    """Decode everything once and remember it beside the checkpoint."""
    saved = run / "pixels.pt"
    if saved.exists():
        raw = torch.load(saved, weights_only=True)
    else:
        cifar = read_tar(data / "cifar10_jpg.tar.gz", list(CIFAR_NAMES), 32)
        clothing = read_tar(data / "clothing_cc0_96.tar", list(ID_CLASSES), CLOTHING_SIDE)
        raw = {
            "cifar10": (cifar["train"], cifar["test"]),
            "clothing": (clothing["train"], clothing["test"]),
            "mnist": read_npz(data / "mnist_10k.npz"),
            "notmnist": read_npz(data / "notmnist_10k.npz"),
        }
        run.mkdir(parents=True, exist_ok=True)
        torch.save(raw, saved)
    _, where = class_table()
    sets = {}
    for name, (train, held_out) in raw.items():
        start = where[name].start
        sets[name] = Set(name, (train[0], train[1] + start), (held_out[0], held_out[1] + start))
    return sets


# images a pass takes from each set (clothing is small and repeated, glyphs are easy)
PASS = {"cifar10": 49_000, "clothing": 8_000, "mnist": 2_000, "notmnist": 2_500}
CIFAR_VALIDATION = 1_000  # last rows of a seeded permutation of the train split, watched only


def cifar_order() -> Tensor:
    return torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(50_000))


def batches(sets: dict[str, Set], size: int, seed: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Endless batches of constant composition: for each set the row numbers to take."""
    rng = torch.Generator().manual_seed(seed)
    pools = {name: torch.arange(len(part.train[1])) for name, part in sets.items()}
    pools["cifar10"] = cifar_order()[:-CIFAR_VALIDATION]
    total = sum(PASS.values())
    share = {name: max(1, round(size * count / total)) for name, count in PASS.items()}
    queue = {name: torch.empty(0, dtype=torch.long) for name in sets}
    while True:
        batch = []
        for name, count in share.items():
            while len(queue[name]) < count:
                pool = pools[name]
                shuffled = pool[torch.randperm(len(pool), generator=rng)]
                queue[name] = torch.cat([queue[name], shuffled])
            batch.append((name, queue[name][:count]))
            queue[name] = queue[name][count:]
        yield batch


# (smallest crop side, largest crop side, shift, degrees, flip, aspect) of the source square
GEOMETRY = {
    "cifar10": (0.75, 1.05, 0.25, 8.0, True, 1.15),
    "clothing": (0.55, 1.1, 0.2, 15.0, True, 1.25),
    "mnist": (0.85, 1.2, 0.2, 12.0, False, 1.15),
    "notmnist": (0.85, 1.2, 0.2, 12.0, False, 1.15),
}


def augment(pixels: Tensor, name: str, strength: float, rng: torch.Generator) -> Tensor:
    """uint8 (N, 3, S, S) → float (N, 3, 64, 64) in [0, 1], cropped, turned, flipped, recoloured.

    ``strength`` scales every deviation from the plain picture: 1 in most of the run, less at its
    end, when the model should meet pictures like those it will be asked about.
    """
    low, high, shift, degrees, flip, aspect = GEOMETRY[name]
    n = len(pixels)

    def uniform(a: float, b: float) -> Tensor:
        return a + (b - a) * torch.rand(n, generator=rng)

    scale = 1 + strength * (uniform(low, high) - 1)
    stretch = torch.exp(strength * math.log(aspect) * uniform(-0.5, 0.5))
    angle = strength * math.radians(degrees) * uniform(-1, 1)
    mirror = torch.where(torch.rand(n, generator=rng) < 0.5, -1.0, 1.0) if flip else torch.ones(n)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    move = strength * shift
    theta = torch.stack(
        [
            torch.stack([mirror * cos * stretch, -sin * stretch, uniform(-move, move)], 1),
            torch.stack([mirror * sin / stretch, cos / stretch, uniform(-move, move)], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [n, 3, SIZE, SIZE], align_corners=False)
    source = pixels.float().div_(255)
    out = F.grid_sample(
        source, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    if name in ("mnist", "notmnist"):
        turned = (torch.rand(n, 1, 1, 1, generator=rng) < 0.4).float()
        return (turned + (1 - 2 * turned) * out).clamp_(0, 1)
    gain = 1 + strength * 0.25 * (2 * torch.rand(n, 1, 1, 1, generator=rng) - 1)
    tint = 1 + strength * 0.1 * (2 * torch.rand(n, 3, 1, 1, generator=rng) - 1)
    contrast = 1 + strength * 0.25 * (2 * torch.rand(n, 1, 1, 1, generator=rng) - 1)
    mean = out.mean((1, 2, 3), keepdim=True)
    return (((out - mean) * contrast + mean) * gain * tint).clamp_(0, 1)


def plain(pixels: Tensor) -> Tensor:
    """The evaluation geometry: the whole square at 64 px (bicubic as Pillow's)."""
    out = F.interpolate(
        pixels.float().div_(255), size=(SIZE, SIZE), mode="bicubic", antialias=True
    )
    return out.clamp_(0, 1)


MEAN = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
STD = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)


def prompts(names: list[list[str]], rng: random.Random) -> list[str]:
    out = []
    for aliases in names:
        name = aliases[0] if rng.random() < 0.6 else rng.choice(aliases)
        template = rng.choice(TEMPLATES if rng.random() < 0.7 else RARE_TEMPLATES)
        out.append(template.replace("{}", name))
    return out


def text_features(model: Any, tokens: Tensor) -> Tensor:
    return F.normalize(model.encode_text(tokens).float(), dim=-1)


@torch.no_grad()
def accuracy(model: Any, part: tuple[Tensor, Tensor], classes: range, text: Tensor) -> float:
    """Zero-shot accuracy among the classes of the set alone."""
    model.eval()
    dtype = model.visual.conv1.weight.dtype
    right = 0
    for start in range(0, len(part[1]), 500):
        pixels = ((plain(part[0][start : start + 500]) - MEAN) / STD).to(dtype)
        image = F.normalize(model.encode_image(pixels).float(), dim=-1)
        best = (image @ text[classes.start : classes.stop].T).argmax(1) + classes.start
        right += int((best == part[1][start : start + 500]).sum())
    model.train()
    return right / len(part[1])


def make_model(patch_dropout: float = 0.0) -> Any:
    config = json.loads(json.dumps(CONFIG))
    config["vision_cfg"]["patch_dropout"] = patch_dropout
    return open_clip.CLIP(**config)


def optimisers(master: dict[str, torch.nn.Parameter], args: argparse.Namespace) -> list[Any]:
    """Muon (if this torch has it) for the matrices of the blocks, AdamW for everything else."""
    use_muon = args.optimiser == "muon" and hasattr(torch.optim, "Muon")
    matrices = [p for n, p in master.items() if use_muon and "resblocks" in n and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in master.values() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    out: list[Any] = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98), fused=True)]
    if matrices:
        muon = torch.optim.Muon(
            matrices,
            lr=args.muon_lr,
            weight_decay=args.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        out.append(muon)
    for optimiser in out:
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return out


def rate(progress: float, warmup: float) -> float:
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))) + 1e-3


def save(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    sets = load_sets(args.data, args.run)
    names, where = class_table()
    tokenize = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    model = make_model(args.patch_dropout)
    master = {n: torch.nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
    model.bfloat16().train()
    live = dict(model.named_parameters())
    optimiser = optimisers(master, args)
    step, seen, elapsed, used = 0, 0, 0.0, set()
    checkpoint = args.run / "checkpoint.pt"
    if args.resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for n, p in master.items():
            p.data.copy_(state["master"][n])
        for one, saved in zip(optimiser, state["optimiser"], strict=True):
            one.load_state_dict(saved)
        step, seen, elapsed = state["step"], state["seen"], state["elapsed"]
        used = set(state["tokens"])
        print(f"resumed at step {step}, {elapsed / 60:.1f} minutes in", flush=True)

    def copy_to_live() -> None:
        with torch.no_grad():
            for n, p in live.items():
                p.copy_(master[n])

    def checkpoint_now() -> None:
        content = {
            "master": {n: p.data for n, p in master.items()},
            "optimiser": [one.state_dict() for one in optimiser],
            "step": step,
            "seen": seen,
            "elapsed": elapsed,
            "tokens": sorted(used),
            "arguments": {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)},
        }
        save(checkpoint, content)

    copy_to_live()
    # A resumed run draws fresh batches: seeds differ by the step it continues from.
    stream = batches(sets, args.batch, args.seed + step)
    rng = torch.Generator().manual_seed(args.seed + 1 + step)
    words = random.Random(args.seed + 2 + step)
    validation = cifar_order()[-CIFAR_VALIDATION:]
    watched = {
        "cifar10": tuple(t[validation] for t in sets["cifar10"].train),
    }
    evaluation_tokens = tokenize([f"a photo of a {aliases[0]}" for aliases in names])
    last = saved_at = watched_at = time.monotonic()
    recent_loss, recent_right, recent_seen, recent_start = 0.0, 0.0, 0, last
    while True:
        progress = step / args.steps if args.steps else elapsed / (60 * args.minutes)
        if progress >= 1:
            break
        late = progress >= args.full_from
        model.visual.patch_dropout.prob = 0.0 if late else args.patch_dropout
        factor = rate(progress, args.warmup)
        for one in optimiser:
            for group in one.param_groups:
                group["lr"] = factor * group["base_lr"]
        parts, labels = [], []
        for name, rows in next(stream):
            source, target = sets[name].train
            parts.append(augment(source[rows], name, 0.5 if late else 1.0, rng))
            labels.append(target[rows])
        images = ((torch.cat(parts) - MEAN) / STD).bfloat16()
        target = torch.cat(labels)
        tokens = tokenize(prompts(names, words))
        used.update(tokens.unique().tolist())
        text = text_features(model, tokens)
        image = F.normalize(model.encode_image(images).float(), dim=-1)
        logits = live["logit_scale"].float().exp() * image @ text.T
        loss = F.cross_entropy(logits, target, label_smoothing=args.smoothing)
        loss.backward()
        with torch.no_grad():
            for n, p in master.items():
                grad = live[n].grad
                p.grad = None if grad is None else grad.float()
                live[n].grad = None
            torch.nn.utils.clip_grad_norm_(master.values(), 1.0)
            for one in optimiser:
                one.step()
            master["logit_scale"].clamp_(0, math.log(100))
        copy_to_live()
        step, seen = step + 1, seen + len(target)
        now = time.monotonic()
        elapsed += now - last
        last = now
        recent_loss += loss.item()
        recent_right += (logits.argmax(1) == target).float().mean().item()
        recent_seen += 1
        if recent_seen == args.log_every:
            speed = recent_seen * len(target) / (now - recent_start)
            left = (args.steps - step) / args.steps if args.steps else 1 - progress
            eta = left * elapsed / max(progress, 1e-6) / 60
            print(
                f"step {step} pass {seen / sum(PASS.values()):.2f} {100 * progress:.1f}% "
                f"loss {recent_loss / recent_seen:.4f} acc {recent_right / recent_seen:.4f} "
                f"scale {live['logit_scale'].item():.2f} "
                f"{speed:.0f} images/s ETA {eta:.1f} min",
                flush=True,
            )
            recent_loss, recent_right, recent_seen, recent_start = 0.0, 0.0, 0, now
        if now - watched_at > 60 * args.watch_minutes:
            model.eval()
            with torch.no_grad():
                text = text_features(model, evaluation_tokens)
            shown = {n: accuracy(model, part, where[n], text) for n, part in watched.items()}
            print("validation", {n: round(v, 4) for n, v in shown.items()}, flush=True)
            watched_at = time.monotonic()
        if now - saved_at > 60 * args.save_minutes:
            checkpoint_now()
            saved_at = time.monotonic()
    checkpoint_now()
    print(f"finished: {step} steps, {seen} images, {elapsed / 60:.1f} minutes", flush=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train or resume")
    one.add_argument("--data", type=Path, required=True, help="folder with the four image sets")
    one.add_argument("--run", type=Path, required=True, help="folder for checkpoint and cache")
    one.add_argument("--resume", action="store_true")
    one.add_argument("--minutes", type=float, default=92.0, help="length of the schedule")
    one.add_argument("--steps", type=int, default=0, help="schedule by steps instead of minutes")
    one.add_argument("--batch", type=int, default=256)
    one.add_argument("--optimiser", choices=["muon", "adamw"], default="muon")
    one.add_argument("--lr", type=float, default=1e-3)
    one.add_argument("--muon-lr", type=float, default=4e-3)
    one.add_argument("--weight-decay", type=float, default=0.05)
    one.add_argument("--warmup", type=float, default=0.04, help="share of the schedule")
    one.add_argument("--patch-dropout", type=float, default=0.5)
    one.add_argument("--full-from", type=float, default=0.75, help="share without patch dropout")
    one.add_argument("--smoothing", type=float, default=0.05)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--threads", type=int, default=2)
    one.add_argument("--log-every", type=int, default=50)
    one.add_argument("--watch-minutes", type=float, default=5.0)
    one.add_argument("--save-minutes", type=float, default=3.0)
    one.set_defaults(run_command=train)
    return top


def main() -> None:
    args = parser().parse_args()
    # On CPUs, attention over so few tokens is faster unfused: 0.33 against 0.50 s for a forward and
    # backward pass of 256 images at half the patches on two Zen 5 cores.
    with sdpa_kernel(SDPBackend.MATH):
        args.run_command(args)


if __name__ == "__main__":
    main()
