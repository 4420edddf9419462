"""Choose and write the photographs of ``fastood demo``, all openly licensed, always the same ones.

    python examples/make_demo_photos.py --data IMAGES [--out fastood/demo]

``IMAGES`` holds ``clothing_cc0_96.tar``, ``skimage_samples.tar`` and ``omniglot_small.tar.gz``.
Which pictures are taken follows from a hash of the seed and their names. Clothing photographs are
of ``test/`` and ``validation/`` only, and one whose bytes also occur in ``train/`` is skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from fastood.demo import CALIBRATION, FAR_OOD, ID, ID_CLASSES, NEAR_OOD, NEAR_OOD_CLASSES

SEED = 20
PER_ID_CLASS, PER_NEAR_CLASS, CHARACTERS = 12, 8, 20
SIDE, QUALITY = 96, 90  # the clothing photographs are 96 px on their shorter side, quality 90
PLAIN = str.maketrans({"_": "-", "(": None, ")": None})  # alphabets in file names
Members = dict[str, bytes]


def read(path: Path) -> Members:
    members = {}
    with tarfile.open(path) as tar:
        for member in tar:
            stream = tar.extractfile(member) if member.isfile() else None
            if stream is not None:
                members[member.name] = stream.read()
    return members


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def draw(names: Iterable[str], count: int) -> list[str]:
    """``count`` names, in name order; the choice is that of a hash and of nothing else."""
    names = list(names)
    if len(names) < count:
        raise ValueError(f"names: expected at least {count} pictures to choose from, got {names}")
    return sorted(sorted(names, key=lambda name: digest(f"{SEED}:{name}".encode()))[:count])


def clothing(members: Members) -> Iterable[tuple[str, str]]:
    """Target and source of the clothing photographs."""
    trained = {digest(data) for name, data in members.items() if name.startswith("train/")}
    plan = [
        (ID, "test", ID_CLASSES, PER_ID_CLASS),
        (CALIBRATION, "validation", ID_CLASSES, PER_ID_CLASS),
        (NEAR_OOD, "test", NEAR_OOD_CLASSES, PER_NEAR_CLASS),
    ]
    for part, split, classes, count in plan:
        for label in classes:
            folder = f"{split}/{label}/"
            fresh = [
                name
                for name, data in members.items()
                if name.startswith(folder) and digest(data) not in trained
            ]
            for number, name in enumerate(draw(fresh, count)):
                yield f"{part}/{label}/{number:02d}.jpg", name


def characters(members: Members) -> Iterable[tuple[str, str]]:
    """One drawing each of different characters, as evenly from the alphabets as they divide."""
    drawings: dict[str, list[str]] = {}
    for name in members:
        if name.endswith(".png"):
            drawings.setdefault(name.rpartition("/")[0], []).append(name)
    alphabets = sorted({folder.split("/")[0] for folder in drawings})
    chosen: list[str] = []
    for number, alphabet in enumerate(alphabets):
        share = CHARACTERS // len(alphabets) + (number < CHARACTERS % len(alphabets))
        own = [folder for folder in drawings if folder.startswith(f"{alphabet}/")]
        chosen += [draw(drawings[folder], 1)[0] for folder in draw(own, share)]
    for name in sorted(chosen):
        alphabet, character, _ = name.split("/")
        yield f"{FAR_OOD[1]}/{alphabet}-{character}.png".translate(PLAIN), name


def reduced(data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = SIDE / min(image.size)
    size = (max(SIDE, round(image.width * scale)), max(SIDE, round(image.height * scale)))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=QUALITY, optimize=True)
    return out.getvalue()


def write(data: Path, out: Path) -> list[dict[str, Any]]:
    """All files under ``out/photos``; returns the manifest's rows."""
    photos = out / "photos"
    if photos.exists():
        shutil.rmtree(photos)
    rows: list[dict[str, Any]] = []

    def put(target: str, body: bytes, archive: str, source: str, licence: str) -> None:
        path = photos / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
        about = {"archive": archive, "source": source, "licence": licence}
        rows.append({"path": target, "sha256": digest(body), "bytes": len(body), **about})

    archive = "clothing_cc0_96.tar"
    members = read(data / archive)
    for target, source in clothing(members):
        put(target, members[source], archive, source, "CC0-1.0")
    (photos / "LICENCE-clothing.txt").write_bytes(members["LICENSE"])

    archive = "skimage_samples.tar"
    members = read(data / archive)
    terms = {}
    for line in members["LICENCES.txt"].decode().splitlines():
        name, _, licence = line.partition(": ")
        terms[name] = licence
    for source in sorted(set(members) - {"LICENCES.txt"}):
        target = f"{FAR_OOD[0]}/{Path(source).stem}.jpg"
        licence = "CC0-1.0" if terms[source].startswith("CC0") else "public domain"
        put(target, reduced(members[source]), archive, source, licence)
    (photos / "LICENCE-scikit-image.txt").write_bytes(members["LICENCES.txt"])

    archive = "omniglot_small.tar.gz"
    members = read(data / archive)
    for target, source in characters(members):
        put(target, members[source], archive, source, "MIT")
    (photos / "LICENCE-omniglot.txt").write_bytes(members["LICENSE"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the photographs of `fastood demo`.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("fastood/demo"))
    args = parser.parse_args()
    rows = write(args.data, args.out)
    shutil.copyfile(Path(__file__).with_name("demo_licences.md"), args.out / "photos/LICENCES.md")
    manifest = {"seed": SEED, "count": len(rows), "files": sorted(rows, key=lambda r: r["path"])}
    (args.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} pictures, {sum(r['bytes'] for r in rows) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
