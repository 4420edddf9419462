"""Fresh augmentation: every epoch decodes its pictures again, a few batches ahead."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastood.data.decode import DECODE_VERSION, decode
from fastood.data.digests import digest_bytes
from fastood.data.imageset import ImageSet
from fastood.errors import DataError, ModelError
from fastood.models.base import Encoder
from fastood.tuning.augment import CLIP_TRAIN, Augmentation, Augmenter
from fastood.tuning.fewshot import labels_and_names
from fastood.tuning.method import Batch, Needs
from fastood.tuning.views import file_contents

__all__ = ["LiveImages"]

_FORWARD = 256
"""Images per pass of the frozen tower; larger batches are cut."""


class LiveImages:
    """Pictures that are decoded, augmented and encoded when a step needs them.

    The pixels of a picture in an epoch are a hash of seed, epoch and file (see
    ``fastood.tuning.augment``). The next batches are decoded by threads while one trains.

    Args:
        encoder: the frozen tower, or whose preprocessing pixels need.
        images: with labels.
        needs: ``"features"``, ``"local"`` (patch features too), or ``"pixels"``, which are handed
            through to a method that trains the tower.
        augmentation: None for the plain picture (validation).
        seed: of the augmentation.
        class_names: names the labels index; default: those of the images.
        workers: threads; default: one per CPU, at most 8.

    Raises:
        ValueError: images without labels, or no class names.
        ModelError: a preprocessing that cannot be augmented; no patch features where needed.
    """

    views: int | None = None

    def __init__(
        self,
        encoder: Encoder,
        images: ImageSet,
        *,
        needs: Needs = "features",
        augmentation: Augmentation | None = CLIP_TRAIN,
        seed: int = 1,
        class_names: Sequence[str] | None = None,
        workers: int | None = None,
    ) -> None:
        if needs not in ("features", "local", "pixels"):
            raise ValueError(f"needs: expected 'features', 'local' or 'pixels', got {needs!r}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers: expected at least 1, got {workers}")
        if needs == "local" and encoder.no_local is not None:
            raise ModelError(f"{encoder.name}: has no local features: {encoder.no_local}")
        self.encoder, self.images, self.needs = encoder, images, needs
        self.name, self.paths = images.name, tuple(item.path for item in images)
        self.labels, self.class_names = labels_and_names(images, class_names)
        self._augmenter = None
        if augmentation is not None:
            self._augmenter = Augmenter(encoder, augmentation, seed=seed)
        else:
            self.views = 1
        self._pool = ThreadPoolExecutor(
            workers or min(8, os.cpu_count() or 1), thread_name_prefix="fastood-live"
        )
        self._coming: dict[tuple[int, int], Future[Tensor]] = {}
        self.digest = self._digest()

    def __len__(self) -> int:
        return len(self.labels)

    def prefetch(self, index: Tensor, epoch: int) -> None:
        for i in index.tolist():
            if (epoch, i) not in self._coming:
                self._coming[epoch, i] = self._pool.submit(self._pixels, i, epoch)

    def batch(self, index: Tensor, epoch: int) -> Batch:
        """See ``TrainingData``.

        Raises:
            DataError: a file that cannot be read or decoded, by name.
        """
        labels = self.labels[index]
        if self.needs == "pixels":
            return Batch(self._stack(index, epoch), labels)
        image, local = [], []
        for start in range(0, max(len(index), 1), _FORWARD):
            pixels = self._stack(index[start : start + _FORWARD], epoch)
            found = self.encoder.encode_image(pixels, local=self.needs == "local")
            image.append(found.image.detach())
            if found.local is not None:
                local.append(found.local.detach())
        return Batch(torch.cat(image), labels, torch.cat(local) if local else None)

    def contents(self) -> Mapping[bytes, str]:
        return file_contents(self.images)

    def describe(self) -> dict[str, Any]:
        kind = "none" if self._augmenter is None else str(self._augmenter.augmentation)
        if self._augmenter is not None:
            kind += f", seed {self._augmenter.seed}, fresh in every epoch"
        return {
            "name": self.name,
            "images": len(self),
            "digest": self.digest,
            "kind": "live images",
            "augmentation": kind,
            "model": self.encoder.name,
        }

    def close(self) -> None:
        """Stop the threads; what was decoded ahead is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._coming.clear()

    def _stack(self, index: Tensor, epoch: int) -> Tensor:
        self.prefetch(index, epoch)
        rows = {i: self._coming[epoch, i] for i in index.tolist()}
        for i in rows:
            del self._coming[epoch, i]
        if not rows:
            shape = self._pixels(0, epoch).shape
            return torch.empty(0, *shape)
        return torch.stack([rows[i].result() for i in index.tolist()])

    def _pixels(self, i: int, epoch: int) -> Tensor:
        item = self.images.items[i]
        try:
            data = item.read()
            picture = decode(data)
        except DataError as error:
            raise DataError(f"{item.path}: {error}") from error
        except OSError as error:
            raise DataError(f"{item.path}: cannot be read: {error.strerror or error}") from error
        if self._augmenter is None:
            return self.encoder.preprocess(picture)
        return self._augmenter(picture, digest_bytes(data), epoch)

    def _digest(self) -> str:
        """Over paths, sizes, labels, encoder and augmentation; files are not read for it."""
        state = hashlib.blake2b(digest_size=16)
        view = None if self._augmenter is None else self._augmenter.id(0)
        head: list[Any] = [self.paths, self.class_names, self.labels.tolist(), self.needs, view]
        head += [self.encoder.fingerprint, self.encoder.preprocess_id, DECODE_VERSION]
        head.append([_size(item.file) for item in self.images])
        state.update(json.dumps(head).encode("utf-8", "backslashreplace"))
        return state.hexdigest()


def _size(file: Any) -> int | None:
    try:
        return None if file is None else int(os.stat(file).st_size)  # noqa: PTH116 - once per image
    except OSError:
        return None
