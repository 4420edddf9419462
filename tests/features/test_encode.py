"""Images to features: what goes in comes out, and bad images shift nothing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastood.data import ImageItem, ImageSet, load_images
from fastood.errors import DataError, ModelError
from fastood.features import FeatureCache, encode_images
from tests.features.toy_encoder import ToyEncoder, write_images


def direct(encoder: ToyEncoder, files: list[Path], *, local: bool = False) -> torch.Tensor:
    """Features one image at a time, without any of the code under test."""
    rows = []
    for file in files:
        with Image.open(file) as image:
            rows.append(encoder.preprocess(image.convert("RGB")))
    with torch.no_grad():
        features = encoder.encode_image(torch.stack(rows), local=local)
    return features.local if local else features.image


def test_features_equal_a_plain_loop(tmp_path: Path, encoder: ToyEncoder) -> None:
    files = write_images(tmp_path / "set", 11)
    found = encode_images(encoder, load_images(tmp_path / "set"), batch_size=4, workers=3)
    assert found.paths == tuple(f.name for f in files)
    assert found.labels is None
    assert found.encoded == len(found) == 11
    torch.testing.assert_close(found.image(), direct(encoder, files), rtol=1e-6, atol=1e-6)
    assert not found.has_local
    assert found.provenance["fingerprint"] == encoder.fingerprint
    assert found.provenance["images"] == 11


def test_local_features_and_their_precision(tmp_path: Path, cache: FeatureCache) -> None:
    encoder = ToyEncoder()
    files = write_images(tmp_path / "set", 9)
    images = load_images(tmp_path / "set")
    wanted = direct(encoder, files, local=True)
    full = encode_images(encoder, images, local=True, local_dtype="float32", batch_size=4)
    got = torch.cat([c.local for c in full.blocks()])
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    half = encode_images(encoder, images, local=True, batch_size=4)
    cached = encode_images(encoder, images, local=True, batch_size=4, cache=cache)
    again = encode_images(encoder, images, local=True, batch_size=4, cache=cache)
    assert again.encoded == 0
    rounded = torch.cat([c.local for c in half.blocks()])
    assert rounded.dtype == torch.float16
    assert torch.equal(rounded, got.to(torch.float16))
    for other in (cached, again):
        assert torch.equal(torch.cat([c.local for c in other.blocks()]), rounded)
        assert torch.equal(other.image(), full.image())


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Every kind of file of the issue, good and bad, in two class folders."""
    folder = tmp_path / "messy"
    write_images(folder / "a", 3)
    noise = np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    whole = io.BytesIO()
    picture.save(whole, "JPEG", quality=95)
    b = folder / "b <b>&amp;"
    b.mkdir()
    (b / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (b / "text.jpg").write_text("this is not a picture")
    (b / "page.jpeg").write_text("<!DOCTYPE html><p>404</p>")
    (b / "empty.png").write_bytes(b"")
    (b / "notes.txt").write_text("not an image, and not named like one")
    picture.convert("L").save(b / "grey.png")
    picture.convert("RGBA").save(b / "alpha.png")
    picture.convert("CMYK").save(b / "cmyk.jpg")
    picture.convert("P").save(b / "palette.gif")
    sixteen = (np.asarray(picture.convert("L")).astype(np.uint16) * 257).copy()
    Image.fromarray(sixteen).save(b / "deep.png")
    Image.fromarray(sixteen).save(b / "deep.tiff")
    frames = [picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save(b / "moves.gif", save_all=True, append_images=frames[1:])
    frames[0].save(b / "moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    picture.save(b / "<script>alert(1)</script>.png".replace("/", "⁄"))
    picture.save(b / "naïve 猫 🐈.png")
    Path(os.fsdecode(os.fsencode(b) + b"/latin-\xe9.png")).write_bytes(
        (b / "grey.png").read_bytes()
    )
    return folder


def test_messy_folder(messy: Path, encoder: ToyEncoder, cache: FeatureCache) -> None:
    images = load_images(messy)
    assert images.class_names == ("a", "b <b>&amp;")
    assert "1 other file ignored (1 .txt)" in images.layout
    found = encode_images(encoder, images, batch_size=2, cache=cache)
    why = {s.path.rpartition("/")[2]: s.reason for s in found.skipped}
    assert why.keys() == {"cut.jpg", "text.jpg", "page.jpeg", "empty.png"}
    assert "truncated" in why["cut.jpg"]
    assert "text" in why["text.jpg"]
    assert "HTML" in why["page.jpeg"]
    assert "0 bytes" in why["empty.png"]
    assert len(found) == 3 + 11
    assert len(found) + len(found.skipped) == len(images)
    assert found.labels is not None
    assert found.labels.tolist() == [0] * 3 + [1] * 11
    features = dict(zip((p.rpartition("/")[2] for p in found.paths), found.image(), strict=True))
    assert "latin-\\xe9.png" in features
    for deep in ("deep.png", "deep.tiff"):  # 16 bits are the same picture, not a white one
        torch.testing.assert_close(features[deep], features["grey.png"])
    torch.testing.assert_close(features["alpha.png"], features["moves.webp"])  # first frame
    again = encode_images(encoder, images, batch_size=2, cache=cache)
    assert again.encoded == 0
    assert again.skipped == found.skipped
    assert torch.equal(again.image(), found.image())
    for text in [*found.paths, *(s.path for s in found.skipped)]:
        text.encode("utf-8")  # reports can be written


def test_bad_images_shift_nothing(tmp_path: Path, encoder: ToyEncoder) -> None:
    files = write_images(tmp_path / "set", 13)
    whole = encode_images(encoder, load_images(tmp_path / "set"), batch_size=3)
    bad = [0, 4, 6, 7, 8, 12]  # 6 to 8 are a whole batch
    for i in bad:
        files[i].write_bytes(b"broken")
    encoder.batches.clear()
    rest = encode_images(encoder, load_images(tmp_path / "set"), batch_size=3)
    good = [i for i in range(13) if i not in bad]
    assert torch.equal(rest.image(), whole.image()[good])  # bit for bit
    assert rest.paths == tuple(whole.paths[i] for i in good)
    assert encoder.batches == [3, 3, 3]  # batches without any readable image are not encoded
    starts = [c.start for c in rest.blocks()]
    assert starts == list(np.cumsum([0, *[len(c.image) for c in rest.blocks()]])[:-1])


def test_strict_names_the_file(tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache) -> None:
    files = write_images(tmp_path / "set", 6)
    files[3].write_bytes(b"")
    images = load_images(tmp_path / "set")
    for _ in range(2):
        with pytest.raises(DataError, match=r"003\.png \(empty file"):
            encode_images(encoder, images, batch_size=2, cache=cache, strict=True)
        encode_images(encoder, images, batch_size=2, cache=cache)  # next time from the cache


def test_nothing_readable(tmp_path: Path, encoder: ToyEncoder) -> None:
    (tmp_path / "a.jpg").write_text("text")
    (tmp_path / "b.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 2 images.*a\.jpg.*b\.jpg"):
        encode_images(encoder, load_images(tmp_path), local=True)


def test_vanished_file_is_skipped(tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache) -> None:
    files = write_images(tmp_path / "set", 5)
    images = load_images(tmp_path / "set")
    kept = files[2].read_bytes()
    files[2].unlink()
    found = encode_images(encoder, images, batch_size=2, cache=cache)
    assert [s.path for s in found.skipped] == ["002.png"]
    assert "No such file" in found.skipped[0].reason
    files[2].write_bytes(kept)  # back again: the cache must not remember its absence
    assert len(encode_images(encoder, images, batch_size=2, cache=cache)) == 5


class Broken(ToyEncoder):
    value = float("nan")

    def encode_image(self, pixels, *, local=False):
        features = super().encode_image(pixels, local=local)
        features.image[1] = self.value
        return features


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_unusable_features_name_the_image(tmp_path: Path, value: float) -> None:
    write_images(tmp_path / "set", 3)
    encoder = Broken()
    encoder.value = value
    with pytest.raises(ModelError, match=r"zero or not finite for 001\.png"):
        encode_images(encoder, load_images(tmp_path / "set"))


def test_unusable_features_of_a_masked_row_do_not_matter(tmp_path: Path) -> None:
    files = write_images(tmp_path / "set", 3)
    files[1].write_bytes(b"")
    assert len(encode_images(Broken(), load_images(tmp_path / "set"))) == 2


def test_local_overflow_is_found(tmp_path: Path, encoder: ToyEncoder) -> None:
    write_images(tmp_path / "set", 2)
    images = load_images(tmp_path / "set")
    with torch.no_grad():
        encoder.tower.weight.mul_(1e6)
    with pytest.raises(ModelError, match=r"local \(float16\).*local_dtype='float32'"):
        encode_images(encoder, images, local=True)
    assert encode_images(encoder, images, local=True, local_dtype="float32").has_local


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no luck"), "preprocessing failed: RuntimeError: no luck"),
        (MemoryError(), "not enough memory to decode it"),
    ],
)
def test_preprocess_failure_is_reported_and_not_remembered(
    tmp_path: Path,
    encoder: ToyEncoder,
    cache: FeatureCache,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
) -> None:
    write_images(tmp_path / "set", 4)
    images = load_images(tmp_path / "set")
    calls = iter(range(100))
    plain = ToyEncoder.preprocess

    def fails_once(image):
        if next(calls) == 0:
            raise error
        return plain(image)

    monkeypatch.setattr(encoder, "preprocess", fails_once)
    found = encode_images(encoder, images, workers=1, cache=cache)
    assert [s.reason for s in found.skipped] == [reason]
    assert len(encode_images(encoder, images, cache=cache)) == 4


def test_progress_and_interrupt(tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache) -> None:
    write_images(tmp_path / "set", 20)
    images = load_images(tmp_path / "set")
    seen: list[tuple[int, int, str]] = []

    def stop(done: int, total: int, name: str) -> None:
        seen.append((done, total, name))
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_images(encoder, images, batch_size=2, cache=cache, progress=stop)
    assert seen == [(d, 20, "set") for d in (2, 4, 6, 8, 10)]
    seen.clear()
    found = encode_images(
        encoder, images, batch_size=2, cache=cache, progress=lambda *a: seen.append(a)
    )
    assert found.encoded == 12  # two whole chunks of four are kept
    assert seen[:2] == [(4, 20, "set"), (8, 20, "set")]
    assert seen[-1] == (20, 20, "set")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"workers": 0}, "workers"),
        ({"local_dtype": "int8"}, "local_dtype"),
    ],
)
def test_wrong_arguments(tmp_path: Path, encoder: ToyEncoder, options: dict, error: str) -> None:
    write_images(tmp_path / "set", 1)
    with pytest.raises(ValueError, match=error):
        encode_images(encoder, load_images(tmp_path / "set"), **options)


def test_refused_before_work(encoder: ToyEncoder) -> None:
    with pytest.raises(TypeError, match="load_images"):
        encode_images(encoder, ["a.png"])
    with pytest.raises(DataError, match="empty"):
        encode_images(encoder, ImageSet("none", "", ()))
    encoder.no_local = "average pooling"
    item = ImageItem("x", read=lambda: b"")
    with pytest.raises(ModelError, match="average pooling"):
        encode_images(encoder, ImageSet("one", "", (item,)), local=True)


def test_preprocess_with_changing_shapes(tmp_path: Path, encoder: ToyEncoder) -> None:
    write_images(tmp_path / "set", 1, size=20)
    write_images(tmp_path / "set" / "z", 1, size=30)
    encoder.preprocess = lambda image: torch.zeros(3, *image.size)
    with pytest.raises(ModelError, match="same shape"):
        encode_images(encoder, load_images(tmp_path / "set"))


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch below 2.9")
def test_programs_with_newer_precision_settings_are_understood():
    """In a process of its own: torch's older and newer settings must not be mixed in one."""
    code = (
        "import torch\n"
        "from fastood.features.conditions import product_precision\n"
        "print(product_precision())\n"
        "torch.backends.fp32_precision = 'tf32'\n"
        "print(product_precision())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["highest", "cuda tf32, mkldnn tf32"]
