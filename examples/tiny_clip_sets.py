"""The image sets, class names, prompts and picture changes the tiny CLIP is trained with.

Never read for training: the CIFAR-10 test split, the last 1,000 of a seeded permutation of MNIST
and of notMNIST, the clothing photographs of ``validation/`` and ``test/``, and every photograph of
a clothing class outside ``fastood.demo.ID_CLASSES``.
"""

from __future__ import annotations

import io
import math
import random
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES
from PIL import Image
from torch import Tensor

from fastood.demo import ID_CLASSES

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
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
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


def pictures(path: Path, split: str, classes: Sequence[str]) -> Iterator[tuple[str, bytes, int]]:
    """Name, bytes and class number of ``split/class/file`` in an archive, listed classes only."""
    with tarfile.open(path) as tar:
        for member in tar:
            parts = member.name.split("/")
            if len(parts) != 3 or parts[0] != split or parts[1] not in classes:
                continue
            stream = tar.extractfile(member)
            if stream is None:
                raise ValueError(f"{path}: {member.name} is no file")
            yield member.name, stream.read(), classes.index(parts[1])


def read_tar(path: Path, split: str, classes: list[str], side: int) -> tuple[Tensor, Tensor]:
    """Pixels and labels 0..len-1, in name order."""
    rows = sorted(pictures(path, split, classes))
    pixels = torch.stack([decode(data, side) for _, data, _ in rows])
    return pixels, torch.tensor([label for _, _, label in rows])


def glyphs(path: Path, part: str) -> tuple[Tensor, Tensor]:
    """``train``: nine in ten glyphs, ``held_out``: the others; uint8 (N, 28, 28) and labels."""
    with np.load(path, allow_pickle=False) as file:
        images = torch.from_numpy(file["images"])
        labels = torch.from_numpy(file["labels"].astype(np.int64))
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(labels)))
    first = len(labels) * 9 // 10
    rows = order[:first] if part == "train" else order[first:]
    return images[rows], labels[rows]


def load_sets(data: Path, run: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """The training pixels, uint8 (N, 3, S, S), with labels into the joint class list.

    Everything is decoded once and remembered in ``run``.
    """
    saved = run / "training_pixels.pt"
    if saved.exists():
        raw = torch.load(saved, weights_only=True)
    else:
        cifar, clothing = data / "cifar10_jpg.tar.gz", data / "clothing_cc0_96.tar"
        raw = {
            "cifar10": read_tar(cifar, "train", list(CIFAR_NAMES), 32),
            "clothing": read_tar(clothing, "train", list(ID_CLASSES), CLOTHING_SIDE),
        }
        for name in ("mnist", "notmnist"):
            images, labels = glyphs(data / f"{name}_10k.npz", "train")
            raw[name] = (images[:, None].expand(-1, 3, -1, -1).contiguous(), labels)
        run.mkdir(parents=True, exist_ok=True)
        torch.save(raw, saved)
    _, where = class_table()
    return {name: (pixels, labels + where[name].start) for name, (pixels, labels) in raw.items()}


# images a pass takes from each set (clothing is small and repeated, glyphs are easy)
PASS = {"cifar10": 49_000, "clothing": 8_000, "mnist": 2_000, "notmnist": 2_500}


def cifar_split(count: int) -> tuple[Tensor, Tensor]:
    """Rows of the CIFAR-10 training split to learn from, and the fiftieth that is only watched."""
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(count))
    return order[: -max(1, count // 50)], order[-max(1, count // 50) :]


def batches(
    sets: dict[str, tuple[Tensor, Tensor]], size: int, seed: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Endless batches of constant composition: for each set the row numbers to take."""
    rng = torch.Generator().manual_seed(seed)
    pools = {name: torch.arange(len(part[1])) for name, part in sets.items()}
    pools["cifar10"] = cifar_split(len(pools["cifar10"]))[0]
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
    out = F.interpolate(pixels.float().div_(255), size=(SIZE, SIZE), mode="bicubic", antialias=True)
    return out.clamp_(0, 1)


MEAN = torch.tensor(OPENAI_DATASET_MEAN).view(3, 1, 1)
STD = torch.tensor(OPENAI_DATASET_STD).view(3, 1, 1)


def prompts(names: list[list[str]], rng: random.Random) -> list[str]:
    """One prompt per class, its name and template drawn at random."""
    out = []
    for aliases in names:
        name = aliases[0] if rng.random() < 0.6 else rng.choice(aliases)
        template = rng.choice(TEMPLATES if rng.random() < 0.7 else RARE_TEMPLATES)
        out.append(template.replace("{}", name))
    return out


def every_prompt() -> list[str]:
    """All prompts training can draw: their tokens are the ones with trained rows."""
    names, _ = class_table()
    return [
        template.replace("{}", name)
        for aliases in names
        for name in aliases
        for template in dict.fromkeys([*TEMPLATES, *RARE_TEMPLATES])
    ]
