"""Training data: given features, cached views, live pictures; what is asked before the work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fastood.data import load_images
from fastood.data.imageset import ImageSet
from fastood.errors import CacheError, DataError, ModelError
from fastood.features import FeatureCache, encode_images
from fastood.room import free_disk, free_memory
from fastood.tuning import views as views_module
from fastood.tuning.augment import TIP_VIEWS, Augmenter
from fastood.tuning.live import LiveImages
from fastood.tuning.loop import train
from fastood.tuning.views import FeatureData, FeatureViews, overlap
from tests.features.toy_encoder import ToyEncoder, write_images
from tests.tuning.launch import launch
from tests.tuning.toy import ToyHead, toy_features

EVERYTHING = torch.arange(8)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    for k in range(2):
        write_images(tmp_path / "train" / f"class {k}", 4, seed=k, size=40)
    return load_images(tmp_path / "train")


def test_given_features_give_their_rows_with_patches():
    features = toy_features(12)
    local = features.image()[:, None, :].expand(12, 3, 16).half().contiguous()
    chunk = features.chunks[0]
    cut = dataclasses.replace(
        features,
        chunks=(
            dataclasses.replace(chunk, image=chunk.image[:5], local=local[:5]),
            dataclasses.replace(chunk, start=5, image=chunk.image[5:], local=local[5:]),
        ),
    )
    data = FeatureData(cut, local=True)
    index = torch.tensor([11, 0, 5, 4, 5])
    batch = data.batch(index, 7)
    assert torch.equal(batch.image, features.image()[index])
    assert torch.equal(batch.local, local[index])
    assert batch.labels.tolist() == [3, 0, 1, 0, 1]
    assert data.batch(torch.tensor([], dtype=torch.int64), 0).local.shape == (0, 3, 16)
    assert FeatureData(cut).batch(index, 0).local is None


def test_the_digest_tells_data_apart():
    base = FeatureData(toy_features())
    assert FeatureData(toy_features()).digest == base.digest
    swapped = dataclasses.replace(toy_features(), labels=toy_features().labels[::-1].copy())
    for other in (
        FeatureData(toy_features(seed=1)),
        FeatureData(swapped),
        FeatureData(toy_features(), ("a", "b", "c", "d")),
        FeatureData([toy_features(), toy_features()]),
    ):
        assert other.digest != base.digest


def test_features_that_cannot_train_are_refused():
    features = toy_features()
    unlabelled = dataclasses.replace(features, labels=np.where(features.labels == 1, -1, 0))
    with pytest.raises(ValueError, match="11 of 44 images have no label"):
        FeatureData(unlabelled)
    with pytest.raises(ValueError, match="no class names"):
        FeatureData(dataclasses.replace(features, class_names=None))
    with pytest.raises(ValueError, match="label 3 has no name"):
        FeatureData(features, ("a", "b", "c"))
    with pytest.raises(ValueError, match="local=True"):
        FeatureData(features, local=True)
    with pytest.raises(ValueError, match=r"view 1 has other images .*40 and 44"):
        FeatureData([features, toy_features(40)])
    with pytest.raises(ValueError, match="at least one"):
        FeatureData([])


def test_epochs_take_cached_views_in_turn(images, tmp_path):
    encoder, cache, lines = ToyEncoder(), FeatureCache(tmp_path / "cache"), []
    options = {"views": 3, "seed": 5, "local": True, "cache": cache, "batch_size": 3}
    data = FeatureViews.encode(encoder, images, **options, log=lines.append)
    seen = [data.batch(EVERYTHING, epoch) for epoch in range(4)]
    assert torch.equal(seen[0].image, seen[3].image)
    assert not torch.equal(seen[0].image, seen[1].image)
    assert seen[1].local.shape == (8, 16, 16)
    assert seen[1].local.dtype == torch.float16
    assert torch.allclose(seen[1].local.float().mean(1), seen[1].image, atol=1e-3)
    augmenter = Augmenter(encoder, seed=5)
    for view in range(3):
        want = encode_images(encoder, images, transform=augmenter.view(view), batch_size=3)
        assert torch.equal(seen[view].image, want.image())
    # 3 views x 8 images x (16 x 4 bytes + 16 patches x 16 x 2 bytes)
    assert lines[0].startswith(f"3 views of 8 images with patches: {3 * 8 * 576 / 1000:.1f} kB in")
    assert "free" in lines[0]
    encoder.batches.clear()
    again = FeatureViews.encode(encoder, images, **options)
    assert not encoder.batches
    assert again.digest == data.digest
    described = data.describe()
    assert "approximation" in described["note"]
    assert "seed 5" in described["augmentation"]
    assert data.views == 3


def test_one_view_is_the_plain_picture(images):
    encoder = ToyEncoder()
    data = FeatureViews.encode(encoder, images)
    assert torch.equal(data.batch(EVERYTHING, 9).image, encode_images(encoder, images).image())
    assert "note" not in data.describe()


def test_views_resume_behind_what_is_there(images, tmp_path):
    encoder, cache = ToyEncoder(), FeatureCache(tmp_path / "cache")

    class Killed(RuntimeError):
        pass

    def kill(done, total, name):
        if len(encoder.batches) == 12:
            raise Killed

    options = {"views": 3, "cache": cache, "batch_size": 1}
    with pytest.raises(Killed):
        FeatureViews.encode(encoder, images, **options, progress=kill)
    encoder.batches.clear()
    data = FeatureViews.encode(encoder, images, **options)
    assert 8 <= len(encoder.batches) < 16
    fresh = FeatureViews.encode(encoder, images, views=3, batch_size=1)
    assert data.digest == fresh.digest


SCRIPT = """
import sys
from fastood.data import load_images
from fastood.errors import DataError
from fastood.features import FeatureCache
from fastood.tuning import views
from fastood.tuning.parallel import World
from tests.features.toy_encoder import ToyEncoder

world, encoder = World.from_environment(), ToyEncoder()
images, cache = load_images(sys.argv[1] + "/train"), FeatureCache(sys.argv[1] + "/cache")
encode = lambda n: views.FeatureViews.encode(encoder, images, views=n, cache=cache, world=world)
print(encode(2).digest, len(encoder.batches))
if world.rank == 0:
    views.free_disk = lambda folder: 1
try:
    encode(3)
except views.CacheError:
    print("no room")
except DataError as error:
    print(error)
"""


@pytest.mark.slow
def test_of_two_processes_the_first_encodes_and_the_other_maps(images, tmp_path):
    first, second = launch(SCRIPT, tmp_path)
    want = FeatureViews.encode(ToyEncoder(), images, views=2).digest
    assert first.splitlines() == [f"{want} 2", "no room"]
    assert second.splitlines() == [
        f"{want} 0", f"{images.name}: the first process could not encode the views"
    ]  # fmt: skip


def test_room_is_checked_before_the_work_and_what_is_there_counts(images, tmp_path, monkeypatch):
    encoder, cache = ToyEncoder(), FeatureCache(tmp_path / "cache")
    options = {"views": 2, "local": True, "batch_size": 4}
    monkeypatch.setattr(views_module, "free_disk", lambda folder: 9000)
    with pytest.raises(CacheError, match=r"2 views of 8 images with patches need 9.2 kB .* 9.0 kB"):
        FeatureViews.encode(encoder, images, **options, cache=cache)
    assert not encoder.batches
    monkeypatch.setattr(views_module, "free_disk", lambda folder: 10_000)
    FeatureViews.encode(encoder, images, **options, cache=cache)
    monkeypatch.setattr(views_module, "free_disk", lambda folder: 4600)
    FeatureViews.encode(encoder, images, **options, cache=cache)  # all of it is there
    with pytest.raises(CacheError, match=r"4\.6 kB more"):
        FeatureViews.encode(encoder, images, **{**options, "views": 3}, cache=cache, seed=1)
    monkeypatch.setattr(views_module, "free_memory", lambda: 9000)
    with pytest.raises(DataError, match=r"need 9.2 kB of memory, 9.0 kB are free"):
        FeatureViews.encode(encoder, images, **options)
    monkeypatch.setattr(views_module, "free_memory", lambda: None)
    FeatureViews.encode(encoder, images, **options)


def test_free_room_is_a_number(tmp_path):
    assert free_disk(tmp_path / "not" / "there") > 0
    assert free_memory() is None or free_memory() > 0


def test_unreadable_images_are_left_out_and_on_record(images, tmp_path):
    images.items[3].file.write_bytes(b"broken")
    data = FeatureViews.encode(ToyEncoder(), images, views=2)
    assert len(data) == 7
    assert data.describe()["skipped"][0][0] == images.items[3].path
    with pytest.raises(DataError):
        FeatureViews.encode(ToyEncoder(), images, views=2, strict=True)


def test_bad_views_are_refused(images):
    with pytest.raises(ValueError, match="views: expected at least 1, got 0"):
        FeatureViews.encode(ToyEncoder(), images, views=0)
    items = tuple(dataclasses.replace(i, label=None) for i in images)
    with pytest.raises(ValueError, match="8 of 8 images have no label"):
        FeatureViews.encode(ToyEncoder(), dataclasses.replace(images, items=items))


def test_live_pictures_do_not_depend_on_order_batches_or_workers(images):
    encoder = ToyEncoder()
    one = LiveImages(encoder, images, needs="local", seed=3, workers=1)
    two = LiveImages(encoder, images, needs="local", seed=3, workers=4)
    want = one.batch(EVERYTHING, 2)
    order = torch.tensor([5, 2, 7, 0, 1, 3, 6, 4])
    two.prefetch(order, 2)
    two.prefetch(order, 3)
    got = [two.batch(part, 2) for part in order.split(3)]
    image = torch.cat([b.image for b in got])
    torch.testing.assert_close(image, want.image[order], rtol=1e-6, atol=1e-6)
    assert torch.equal(torch.cat([b.labels for b in got]), want.labels[order])
    assert want.local.shape == (8, 16, 16)
    assert not torch.allclose(one.batch(EVERYTHING, 3).image, want.image)
    pixels = LiveImages(encoder, images, needs="pixels", seed=3)
    assert torch.equal(pixels.batch(order, 2).image, pixels.batch(EVERYTHING, 2).image[order])
    assert torch.allclose(encoder.encode_image(pixels.batch(EVERYTHING, 2).image).image, want.image)
    assert pixels.batch(torch.tensor([], dtype=torch.int64), 0).image.shape == (0, 3, 32, 32)
    assert one.batch(torch.tensor([], dtype=torch.int64), 0).image.shape == (0, 16)
    for data in (one, two, pixels):
        data.close()


def test_live_pictures_of_an_epoch_are_the_cached_view_of_that_number(images):
    encoder = ToyEncoder()
    live = LiveImages(encoder, images, augmentation=TIP_VIEWS, seed=3)
    cached = FeatureViews.encode(
        encoder, images, views=3, augmentation=TIP_VIEWS, seed=3, batch_size=8
    )
    for epoch in range(3):
        assert torch.equal(
            live.batch(EVERYTHING, epoch).image, cached.batch(EVERYTHING, epoch).image
        )
    plain = LiveImages(encoder, images, augmentation=None)
    assert torch.equal(plain.batch(EVERYTHING, 4).image, plain.batch(EVERYTHING, 0).image)
    assert plain.views == 1
    assert len({live.digest, plain.digest, cached.digest}) == 3
    assert LiveImages(encoder, images, augmentation=TIP_VIEWS, seed=4).digest != live.digest


def test_live_pictures_train_resume_and_name_a_broken_file(images, tmp_path):
    encoder = ToyEncoder()
    recipe = dataclasses.replace(ToyHead.recipe, epochs=3, batch_size=3)

    def run(data, **options):
        method = ToyHead(encoder, images.class_names)
        train(method, data, recipe=recipe, **options)
        return method.weight.detach()

    class Breaks(LiveImages):
        fuse = 5

        def batch(self, index, epoch):
            self.fuse -= 1
            if self.fuse == 0:
                raise KeyboardInterrupt
            return super().batch(index, epoch)

    want = run(LiveImages(encoder, images, seed=2))
    with pytest.raises(KeyboardInterrupt):
        run(Breaks(encoder, images, seed=2), out=tmp_path / "out")
    data = LiveImages(encoder, images, seed=2, workers=1)
    assert torch.equal(run(data, out=tmp_path / "out", resume=True), want)
    bad = images.items[6]
    bad.file.write_bytes(bad.file.read_bytes()[:50])
    with pytest.raises(DataError, match=bad.path):
        run(LiveImages(encoder, images, seed=2))


def test_bad_live_pictures_are_refused(images):
    encoder = ToyEncoder()
    with pytest.raises(ValueError, match="needs"):
        LiveImages(encoder, images, needs="everything")
    with pytest.raises(ValueError, match="no class names"):
        LiveImages(encoder, dataclasses.replace(images, class_names=None))
    with pytest.raises(ValueError, match="label 1 has no name"):
        LiveImages(encoder, images, class_names=["one"])
    encoder.no_local = "it has none"
    with pytest.raises(ModelError, match="it has none"):
        LiveImages(encoder, images, needs="local")


def test_overlap_is_found_by_content_under_any_name(images, tmp_path):
    encoder = ToyEncoder()
    folder = tmp_path / "val"
    for k in range(2):
        write_images(folder / f"class {k}", 2, seed=10 + k, size=40)
    copied = folder / "class 1" / "renamed.png"
    copied.write_bytes(images.items[5].read())
    validation = load_images(folder)
    live = LiveImages(encoder, images)
    assert overlap(live, LiveImages(encoder, validation)) == ["class 1/renamed.png"]
    cached = FeatureViews.encode(encoder, images, views=2)
    assert overlap(cached, FeatureViews.encode(encoder, validation)) == ["class 1/renamed.png"]
    assert overlap(live, FeatureData(encode_images(encoder, images))) == list(live.paths)
