"""What training reads from: features that are given, cached augmented views, or live pictures.

The frozen image tower is most of the work. ``FeatureViews`` runs it once per view and then trains
at the speed of the text tower; epoch e sees view e mod V. That is an approximation of fresh
augmentation in every epoch, exact only for V >= epochs. ``LiveImages`` (fastood.tuning.live)
augments freshly and runs the tower in every step.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastood.data.digests import digest_bytes
from fastood.data.imageset import ImageSet
from fastood.errors import CacheError, DataError
from fastood.features.cache import FeatureCache
from fastood.features.encode import PixelTransform, Progress, encode_images
from fastood.features.featureset import FeatureSet
from fastood.features.missing import count_missing
from fastood.models.base import Encoder
from fastood.room import free_disk, free_memory, size_text
from fastood.tuning.augment import CLIP_TRAIN, Augmentation, Augmenter
from fastood.tuning.fewshot import known_labels, labels_and_names
from fastood.tuning.method import Batch
from fastood.tuning.parallel import World

__all__ = ["FeatureData", "FeatureViews", "TrainingData", "file_contents", "overlap"]


class TrainingData(Protocol):
    """Labelled images in an order of their own, n of them.

    Attributes:
        name: for messages.
        class_names: names the labels index.
        labels: (n,) int64.
        paths: n names.
        digest: text that is equal exactly when training would see the same data.
        views: V views that epochs take in turn; None: each epoch sees new ones.
    """

    name: str
    class_names: tuple[str, ...]
    labels: Tensor
    paths: tuple[str, ...]
    digest: str
    views: int | None

    def batch(self, index: Tensor, epoch: int) -> Batch:
        """Images ``index (B,)`` as ``epoch`` sees them."""

    def prefetch(self, index: Tensor, epoch: int) -> None:
        """These will be asked for soon."""

    def contents(self) -> Mapping[bytes, str]:
        """Digest of what every image is → its path."""

    def describe(self) -> dict[str, Any]:
        """For the record, as JSON values."""


class FeatureData:
    """Features somebody already has: one set, or several views of the same images.

    Args:
        views: V feature sets with equal paths and labels.
        class_names: names the labels index; default: those of the features.
        local: hand out patch features as well.
        device: where the global features are kept.

    Raises:
        ValueError: images without labels, no class names, views that do not fit together, or
            ``local`` without patch features.
    """

    def __init__(
        self,
        views: FeatureSet | Sequence[FeatureSet],
        class_names: Sequence[str] | None = None,
        *,
        local: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        sets = [views] if isinstance(views, FeatureSet) else list(views)
        if not sets:
            raise ValueError("views: expected at least one feature set, got none")
        first = sets[0]
        self.name, self.paths = first.name, first.paths
        self.labels, self.class_names = labels_and_names(first, class_names)
        for number, other in enumerate(sets[1:], 1):
            if other.paths != first.paths or known_labels(other) != known_labels(first):
                raise ValueError(
                    f"{self.name}: view {number} has other images than view 0 ({len(other)} and "
                    f"{len(first)}); did files change while views were encoded?"
                )
        if local and not all(s.has_local for s in sets):
            raise ValueError(
                f"{self.name}: this method trains with patch features, which these features do "
                "not have; encode the images with local=True"
            )
        self.views: int | None = len(sets)
        self._image = torch.stack([s.image() for s in sets]).to(device)
        self._sets, self._local = sets, local
        self._starts = [[c.start for c in s.chunks] for s in sets]
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor, epoch: int) -> Batch:
        view = epoch % len(self._sets)
        image = self._image[view][index.to(self._image.device)]
        local = self._patches(index, view) if self._local else None
        return Batch(image, self.labels[index], local)

    def prefetch(self, index: Tensor, epoch: int) -> None:
        del index, epoch

    def contents(self) -> Mapping[bytes, str]:
        rows = self._image[0].cpu().float().contiguous().numpy()
        return {
            b"features" + digest_bytes(row.tobytes()): path
            for row, path in zip(rows, self.paths, strict=True)
        }

    def describe(self) -> dict[str, Any]:
        found: dict[str, Any] = {"name": self.name, "images": len(self), "digest": self.digest}
        found["kind"] = "features"
        found["model"] = self._sets[0].provenance.get("model")
        return found

    def _patches(self, index: Tensor, view: int) -> Tensor:
        """(B, P, D): rows copied out of mapped files."""
        chunks, starts = self._sets[view].chunks, self._starts[view]
        rows = []
        for i in index.tolist():
            chunk = chunks[bisect_right(starts, i) - 1]
            assert chunk.local is not None  # checked when built
            rows.append(chunk.local[i - chunk.start])
        if not rows:
            known = chunks[0].local
            assert known is not None
            return known[:0].clone()
        return torch.stack(rows)

    def _digest(self) -> str:
        """Over labels, names, paths and global features; patches come from the same pass."""
        state = hashlib.blake2b(digest_size=16)
        head = [self.paths, self.class_names, self.labels.tolist(), self._local, len(self._sets)]
        state.update(json.dumps(head).encode("utf-8", "backslashreplace"))
        state.update(self._image.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return state.hexdigest()


class FeatureViews(FeatureData):
    """V views of every image, encoded once and kept: made by :meth:`encode`."""

    images: ImageSet
    augmentation: str

    @classmethod
    def encode(
        cls,
        encoder: Encoder,
        images: ImageSet,
        *,
        views: int = 1,
        augmentation: Augmentation = CLIP_TRAIN,
        seed: int = 1,
        class_names: Sequence[str] | None = None,
        local: bool = False,
        cache: FeatureCache | None = None,
        batch_size: int = 64,
        workers: int | None = None,
        strict: bool = False,
        progress: Progress | None = None,
        log: Callable[[str], None] | None = None,
        world: World | None = None,
    ) -> FeatureViews:
        """Run the frozen image tower over V views of every image.

        One view is the picture as the encoder's preprocessing leaves it (a single fixed crop would
        be trained on in every epoch); two and more are all augmented. With a cache, views that are
        there are mapped, and a killed run resumes behind its last whole chunk.

        Args:
            encoder: the frozen tower.
            images: with labels.
            views: V.
            augmentation: of V >= 2 views.
            seed: of the augmentation.
            local: also patch features, in float16.
            cache: where features are kept; None: in memory.
            batch_size, workers, strict, progress: as ``encode_images``.
            log: told the size before the work begins.
            world: with several processes and a cache the first encodes and the others map.

        Raises:
            ValueError: views < 1, images without labels.
            CacheError: if the disk has less room than the views need (both numbers).
            DataError: the same for memory without a cache; no image can be read.
            ModelError: if the preprocessing cannot be augmented, or there are no patch features.
        """
        if views < 1:
            raise ValueError(f"views: expected at least 1, got {views}")
        known_labels(images)
        transforms: list[PixelTransform | None] = [None]
        if views > 1:
            augmenter = Augmenter(encoder, augmentation, seed=seed)
            transforms = [augmenter.view(v) for v in range(views)]
        world = world or World.alone()
        options: dict[str, Any] = {"local": local, "batch_size": batch_size, "cache": cache}

        def all_views() -> list[FeatureSet]:
            _check_room(encoder, images, transforms, options, log if world.rank == 0 else None)
            return [
                encode_images(
                    encoder, images, **options, workers=workers, strict=strict,
                    progress=progress, transform=transform,
                )
                for transform in transforms
            ]  # fmt: skip

        sets = None
        if cache is not None and world.size > 1:
            failed = torch.ones(1)
            try:
                sets = all_views() if world.rank == 0 else None
                failed = torch.zeros(1)
            finally:
                # Whatever happens to the first, the others must not wait for it forever.
                failed = world.sum(failed)
            if failed.item():
                raise DataError(f"{images.name}: the first process could not encode the views")
        sets = all_views() if sets is None else sets
        found = cls(sets, class_names, local=local, device=encoder.device)
        found.images = images
        found.augmentation = "none" if views == 1 else f"{augmentation}, seed {seed}"
        return found

    def contents(self) -> Mapping[bytes, str]:
        return file_contents(self.images)

    def describe(self) -> dict[str, Any]:
        found = {**super().describe(), "kind": "cached views", "views": self.views}
        found["augmentation"] = self.augmentation
        if self.views and self.views > 1:
            found["note"] = (
                f"epochs take {self.views} cached views in turn, an approximation of fresh "
                "augmentation"
            )
        skipped = self._sets[0].skipped
        if skipped:
            found["skipped"] = [[s.path, s.reason] for s in skipped]
        return found


def file_contents(images: ImageSet) -> dict[bytes, str]:
    """Content digest → path of every file that can be read."""
    found = {}
    for item in images:
        try:
            found[b"file" + digest_bytes(item.read())] = item.path
        except Exception:
            continue
    return found


def overlap(training: TrainingData, validation: TrainingData) -> list[str]:
    """Paths of validation images that are training images too, by content.

    Files are compared with files and given features with given features. Where one side is files
    and the other features, equal paths count.
    """
    ours, theirs = training.contents(), validation.contents()
    if {key[:4] for key in ours} == {key[:4] for key in theirs}:
        return sorted(path for key, path in theirs.items() if key in ours)
    return sorted(set(training.paths) & set(validation.paths))


def _check_room(
    encoder: Encoder,
    images: ImageSet,
    transforms: Sequence[PixelTransform | None],
    options: dict[str, Any],
    log: Callable[[str], None] | None,
) -> None:
    """Say how large the views will be; refuse what does not fit."""
    cache, local = options["cache"], options["local"]
    row = encoder.embed_dim * encoder.dtype.itemsize
    if local:
        row += 2 * encoder.embed_dim * (encoder.num_patches or 0)
    needed = row * len(images) * len(transforms)
    what = f"{len(transforms)} view{'s' * (len(transforms) > 1)} of {len(images)} images"
    what += " with patches" if local else ""
    free = free_memory() if cache is None else free_disk(cache.root)
    place = "memory" if cache is None else str(cache.root)
    if log is not None:
        log(f"{what}: {size_text(needed)} in {place}" + _of(free))
    if free is None or needed <= free:
        return
    if cache is None:
        raise DataError(
            f"{images.name}: {what} need {size_text(needed)} of memory, {size_text(free)} are "
            "free; use a cache, fewer views, or live augmentation"
        )
    # Some of it may be there already.
    missing = [
        count_missing(encoder, images, **options, transform=transform) for transform in transforms
    ]
    needed = row * sum(missing)
    if needed > free:
        raise CacheError(
            f"cache folder {cache.root}: {what} need {size_text(needed)} more, {size_text(free)} "
            "are free; make room (fastood cache clear), choose another folder with FASTOOD_CACHE, "
            "or use fewer views"
        )


def _of(free: int | None) -> str:
    return "" if free is None else f" ({size_text(free)} free)"
