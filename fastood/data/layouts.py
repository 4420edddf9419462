"""Folder layouts of the field's projects, as a table."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastood.data.paths import path_text

__all__ = ["Layout", "SubSet", "recognise"]


@dataclass(frozen=True)
class SubSet:
    """One set inside a recognised layout.

    Attributes:
        name: short name, for example ``"iNaturalist"``.
        source: what to pass to ``load_images``.
        split: what to pass as ``split``, or None.
        role: ``"id"``, ``"ood"``, or None where the layout does not say.
    """

    name: str
    source: Path
    split: str | None = None
    role: str | None = None


@dataclass(frozen=True)
class Layout:
    """What a folder was recognised as.

    Attributes:
        name: project and kind, for example ``"MCM ImageNet_OOD_dataset"``.
        description: one sentence with the sets found and missing.
        sets: the sets found.
        missing: expected by the layout, but not there.
    """

    name: str
    description: str
    sets: tuple[SubSet, ...]
    missing: tuple[str, ...] = ()


# CoOp: data set folder → (image folder, split file; None: the splits are folders)
_COOP: dict[str, tuple[str, str | None]] = {
    "imagenet": ("images", None),
    "caltech-101": ("101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": ("images", "split_zhou_OxfordPets.json"),
    "stanford_cars": ("", "split_zhou_StanfordCars.json"),
    "oxford_flowers": ("jpg", "split_zhou_OxfordFlowers.json"),
    "food-101": ("images", "split_zhou_Food101.json"),
    "dtd": ("images", "split_zhou_DescribableTextures.json"),
    "sun397": ("SUN397", "split_zhou_SUN397.json"),
    "eurosat": ("2750", "split_zhou_EuroSAT.json"),
    "ucf101": ("UCF-101-midframes", "split_zhou_UCF101.json"),
}

# The four OOD sets of ImageNet-1k → folders they are known to lie in, most specific first
_IMAGENET_OOD: dict[str, tuple[str, ...]] = {
    "iNaturalist": ("iNaturalist",),
    "SUN": ("SUN", "Sun"),
    "Places": ("Places", "Places365"),
    "Texture": ("dtd/images", "Texture", "Textures"),
}

_IMAGENETS = ("ImageNet", "ImageNet10", "ImageNet20", "ImageNet100")


def recognise(root: str | Path) -> Layout | None:
    """Recognise the layouts of CoOp, MCM, LoCoOp, OpenOOD and SeTAR.

    Args:
        root: a folder, either one set or the folder above several.

    Returns:
        The layout with the sets found and the expected ones that are missing, or None if the
        folder is none of these (it may still be an ordinary image folder).
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        return None
    for rule in (_openood, _setar, _mcm, _locoop, _imagenet_ood, _coop_root, _coop_set):
        try:
            layout = rule(folder)
        except OSError:  # a folder that cannot be listed is nothing we know
            continue
        if layout is not None:
            return layout
    return None


def _layout(name: str, sets: list[SubSet], missing: list[str]) -> Layout:
    text = f"{name}: {len(sets)} set{'s' * (len(sets) != 1)} ({', '.join(s.name for s in sets)})"
    if missing:
        text += f"; missing: {', '.join(missing)}"
    return Layout(name, text, tuple(sets), tuple(missing))


def _imagenet_ood(folder: Path) -> Layout | None:
    """``{iNaturalist,SUN,Places,dtd/images}`` (MCM) or ``{...,Texture}`` (LoCoOp)."""
    sets, missing = [], []
    for name, places in _IMAGENET_OOD.items():
        place = next((folder / p for p in places if (folder / p).is_dir()), None)
        if place is None:
            missing.append(name)
        else:
            sets.append(SubSet(name, place, role="ood"))
    if len(sets) < 2:
        return None
    mcm = any(s.source.parent.name == "dtd" for s in sets)
    return _layout("MCM OOD sets" if mcm else "LoCoOp OOD sets", sets, missing)


def _mcm(folder: Path) -> Layout | None:
    """``ImageNet*/{train,val}`` beside ``ImageNet_OOD_dataset``."""
    if not (folder / "ImageNet_OOD_dataset").is_dir():
        return None
    sets, missing = [], []
    for name in _IMAGENETS:
        if (folder / name / "val").is_dir():
            sets.append(SubSet(name, folder / name, "val", "id"))
        else:
            missing.append(f"{name}/val")
    inner = _imagenet_ood(folder / "ImageNet_OOD_dataset")
    if inner is None:
        missing.append("ImageNet_OOD_dataset/{iNaturalist,SUN,Places,dtd/images}")
    else:
        sets += inner.sets
        missing += inner.missing
    return _layout("MCM data sets", sets, missing) if sets else None


def _coop_parts(folder: Path, name: str) -> tuple[list[SubSet], list[str]]:
    images, split_file = _COOP[name]
    if split_file is None:
        splits = [s for s in ("train", "val") if (folder / images / s).is_dir()]
        sets = [SubSet(name, folder / images, s) for s in splits]
        missing = [f"{name}/{images}/{s}" for s in ("train", "val") if s not in splits]
        if sets and not (folder / "classnames.txt").is_file():
            missing.append(f"{name}/classnames.txt")
        return sets, missing
    missing = [] if (folder / images).is_dir() else [f"{name}/{images}"]
    if not (folder / split_file).is_file():
        return [], [*missing, f"{name}/{split_file}"]
    sets = [SubSet(name, folder / split_file, s) for s in ("train", "val", "test")]
    return (sets, missing) if not missing else ([], missing)


def _locoop(folder: Path) -> Layout | None:
    """CoOp's ``imagenet`` with the OOD sets beside it."""
    inner = _imagenet_ood(folder)
    if inner is None or not (folder / "imagenet").is_dir():
        return None
    sets, missing = _coop_parts(folder / "imagenet", "imagenet")
    own = [dataclasses.replace(s, role="id") for s in sets]
    return _layout("LoCoOp data sets", [*own, *inner.sets], [*missing, *inner.missing])


def _coop_root(folder: Path) -> Layout | None:
    """The folder above CoOp's data sets."""
    present = [name for name in _COOP if (folder / name).is_dir()]
    sets: list[SubSet] = []
    missing: list[str] = []
    for name in present:
        found, lost = _coop_parts(folder / name, name)
        sets += found
        missing += lost
    return _layout("CoOp data sets", sets, missing) if sets else None


def _coop_set(folder: Path) -> Layout | None:
    """One of CoOp's data sets, recognised by its split file (or classnames.txt)."""
    for name, (_, split_file) in _COOP.items():
        mark = split_file or "classnames.txt"
        if (folder / mark).is_file():
            sets, missing = _coop_parts(folder, name)
            return _layout(f"CoOp {name}", sets, missing) if sets else None
    return None


def _openood(folder: Path) -> Layout | None:
    """``benchmark_imglist/<benchmark>/*.txt`` beside ``images_classic``, ``images_largescale``."""
    lists = folder / "benchmark_imglist"
    if folder.name == "benchmark_imglist":
        lists, folder = folder, folder.parent
    if not lists.is_dir():
        return None
    files = sorted(lists.glob("*/*.txt")) + sorted(lists.glob("*.txt"))
    sets = [SubSet(_list_name(lists, f), f, role=_role(f)) for f in files]
    missing = [n for n in ("images_classic", "images_largescale") if not (folder / n).is_dir()]
    return _layout("OpenOOD benchmark lists", sets, missing) if sets else None


def _list_name(lists: Path, file: Path) -> str:
    return path_text(file.relative_to(lists).with_suffix(""))


def _role(file: Path) -> str | None:
    """OpenOOD: ``test_cifar10.txt`` in the folder ``cifar10`` is ID, the others are OOD."""
    words = re.split(r"[_.]", file.stem)
    if words[0] not in ("test", "val", "train"):
        return None
    return "id" if words[1:] == [file.parent.name] else "ood"


def _setar(folder: Path) -> Layout | None:
    """``ID_*/{test,val}/<class>/`` and ``OOD_*/test/``."""
    sets, missing = [], []
    kinds: dict[str, tuple[str, Callable[[str], bool]]] = {
        "id": ("ID_", lambda s: s in ("test", "val")),
        "ood": ("OOD_", lambda s: s == "test"),
    }
    named = [p for p in folder.iterdir() if p.name.startswith(("ID_", "OOD_"))]
    for child in sorted(p for p in named if p.is_dir()):
        for role, (prefix, wanted) in kinds.items():
            if child.name.startswith(prefix):
                splits = [s for s in ("val", "test") if wanted(s) and (child / s).is_dir()]
                sets += [SubSet(path_text(child.name), child, s, role) for s in splits]
                if not splits:
                    missing.append(f"{path_text(child.name)}/test")
    return _layout("SeTAR data sets", sets, missing) if sets else None
