"""The cache gives back the same bits, recomputes exactly what changed, and deletes only its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from fastood.data import load_images
from fastood.errors import CacheError
from fastood.features import FeatureCache, encode_images
from tests.features.toy_encoder import ToyEncoder, write_images

OLD = 1_500_000_000  # seconds; a file this old has settled, so its digest is remembered


def chunk_files(cache: FeatureCache) -> list[Path]:
    return sorted((cache.root / "chunks").glob("*/*.safetensors"))


def run(encoder: ToyEncoder, folder: Path, cache: FeatureCache | None, **options):
    return encode_images(encoder, load_images(folder), batch_size=2, cache=cache, **options)


def test_second_run_encodes_nothing(
    tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache
) -> None:
    write_images(tmp_path / "set", 19)
    first = run(encoder, tmp_path / "set", cache)
    encoder.batches.clear()
    second = run(encoder, tmp_path / "set", cache)
    assert (first.encoded, second.encoded) == (19, 0)
    assert not encoder.batches
    assert torch.equal(first.image(), second.image())
    assert torch.equal(first.image(), run(encoder, tmp_path / "set", None).image())
    assert len(chunk_files(cache)) == 5


def test_content_decides_not_the_name(
    tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache
) -> None:
    write_images(tmp_path / "set", 10)
    first = run(encoder, tmp_path / "set", cache)
    shutil.copytree(tmp_path / "set", tmp_path / "moved")
    for file in (tmp_path / "moved").iterdir():
        os.utime(file)
    assert run(encoder, tmp_path / "moved", cache).encoded == 0
    changed = tmp_path / "set" / "009.png"
    changed.write_bytes((tmp_path / "set" / "000.png").read_bytes())
    again = run(encoder, tmp_path / "set", cache)
    assert again.encoded == 2  # only the chunk of images 8 and 9
    assert torch.equal(again.image()[:9], first.image()[:9])
    assert not torch.equal(again.image()[9], first.image()[9])


@pytest.mark.parametrize("change", ["weights", "preprocess", "batch", "local", "local_dtype"])
def test_what_features_depend_on_is_in_the_key(
    tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache, change: str
) -> None:
    write_images(tmp_path / "set", 4)
    images = load_images(tmp_path / "set")
    options = {"batch_size": 2, "local": change == "local_dtype", "cache": cache}
    encode_images(encoder, images, **options)
    if change == "weights":
        encoder = ToyEncoder(seed=1)
    elif change == "preprocess":
        encoder.preprocess_id = "other"
    elif change == "batch":
        options["batch_size"] = 3
    elif change == "local":
        options["local"] = True
    else:
        options["local_dtype"] = "float32"
    assert encode_images(encoder, images, **options).encoded == 4


def test_known_files_are_not_read_again(
    tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_images(tmp_path / "set", 6)
    run(encoder, tmp_path / "set", cache)
    reads: list[str] = []
    plain = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda p: (reads.append(p.name), plain(p))[1])
    run(encoder, tmp_path / "set", cache)
    assert len(reads) == 6  # just written: a change could hide behind the clock's resolution
    # ctime cannot be set, so let the clock move on instead
    monkeypatch.setattr(time, "time_ns", lambda: 2 * 10**18)
    run(encoder, tmp_path / "set", cache)
    reads.clear()
    assert run(encoder, tmp_path / "set", cache).encoded == 0
    assert reads == []
    assert run(encoder, tmp_path / "set", cache, verify=True).encoded == 0
    assert len(reads) == 6
    reads.clear()
    os.utime(files[1], (OLD, OLD))  # touched: read again, found equal, not encoded again
    assert run(encoder, tmp_path / "set", cache).encoded == 0
    assert reads == ["001.png"]


def test_table_of_digests_may_be_damaged(
    tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache
) -> None:
    write_images(tmp_path / "set", 3)
    run(encoder, tmp_path / "set", cache)
    cache.digests.close()
    for junk in (b"", b"not a database at all" * 100):
        (cache.root / "digests.sqlite3").write_bytes(junk)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            other = FeatureCache(cache.root)
            assert run(encoder, tmp_path / "set", other).encoded == 0
        other.digests.close()
    (cache.root / "digests.sqlite3").write_bytes(b"not a database at all" * 100)
    with pytest.warns(RuntimeWarning, match="built again"):
        run(encoder, tmp_path / "set", FeatureCache(cache.root))


def damage(file: Path, how: str) -> None:
    data = bytearray(file.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "header":
        data[data.index(b"valid") + 1] ^= 1
    elif how == "reason":  # still a well-formed file, with another text in it
        data = data.replace(b"not an image", b"not an imbge")
    elif how == "rows":
        data[-3] ^= 1  # the mask lies behind the features
    elif how == "features":
        data[-30] ^= 4
    elif how == "grown":
        data += b"\0" * 7
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "header", "reason", "rows", "features", "grown"]
)
def test_damaged_chunk_is_computed_again(
    tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache, how: str
) -> None:
    write_images(tmp_path / "set", 12)
    (tmp_path / "set" / "003.png").write_bytes(b"bad")
    first = run(encoder, tmp_path / "set", cache)
    (file,) = [f for f in chunk_files(cache) if b"not an image" in f.read_bytes()]
    wanted = first.image()
    damage(file, how)
    with pytest.warns(RuntimeWarning, match="damaged.*computed again"):
        again = run(encoder, tmp_path / "set", cache)
    assert again.encoded == 3
    assert again.skipped == first.skipped
    assert torch.equal(again.image(), wanted)
    assert run(encoder, tmp_path / "set", cache).encoded == 0


@pytest.mark.parametrize("verify", [False, True])
def test_flipped_local_bits_are_found(
    tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache, verify: bool
) -> None:
    write_images(tmp_path / "set", 2)
    run(encoder, tmp_path / "set", cache, local=True)
    (file,) = chunk_files(cache)
    data = bytearray(file.read_bytes())
    data[-40] ^= 1  # safetensors puts float32 before float16 before bool
    file.write_bytes(bytes(data))
    with pytest.warns(RuntimeWarning, match="local features do not match"):
        assert run(encoder, tmp_path / "set", cache, local=True, verify=verify).encoded == 2


def test_stored_features_are_mapped_not_read(
    tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache
) -> None:
    write_images(tmp_path / "set", 8)
    found = run(encoder, tmp_path / "set", cache)
    file = chunk_files(cache)[0]
    if Path("/proc/self/maps").exists():
        assert file.name in Path("/proc/self/maps").read_text()
    kept = found.image().clone()
    found.chunks[0].image.zero_()  # a private mapping: the file stays as it is
    assert torch.equal(run(encoder, tmp_path / "set", cache).image(), kept)


def test_small_tensors(cache: FeatureCache) -> None:
    assert cache.get("prompts") is None
    for tensor in (torch.randn(3, 4), torch.randn(2, 3).half(), torch.zeros(0, 5)):
        cache.put("prompts", tensor)
        got = cache.get("prompts")
        assert got is not None
        assert got.dtype == tensor.dtype
        assert torch.equal(got, tensor)
    assert cache.get("prompts \udce9") is None
    (file,) = (cache.root / "tensors").iterdir()
    file.write_bytes(file.read_bytes()[:20])
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert cache.get("prompts") is None


def test_info_and_clear(tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache) -> None:
    write_images(tmp_path / "set", 10)
    run(encoder, tmp_path / "set", cache)
    cache.put("x", torch.ones(3))
    info = cache.info()
    assert info["chunks"] == 3
    assert info["images"] == 10
    assert info["tensors"] == 1
    assert info["models"]["toy"]["images"] == 10
    assert info["bytes"] >= 10 * 16 * 4
    foreign = [
        cache.root / "mine.txt",
        cache.root / "chunks" / "photo.jpg",
        cache.root / "chunks" / "ab" / "model.safetensors",
        cache.root / "tmp" / "work.tmp",
    ]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_text("not yours")
    assert cache.clear(older_than=3600) == {"files": 0, "bytes": 0}
    old = chunk_files(cache)[0]
    os.utime(next(f for f in chunk_files(cache) if f.name != "model.safetensors"), (OLD, OLD))
    assert cache.clear(older_than=3600)["files"] == 1
    assert cache.clear()["files"] >= 2
    assert all(file.exists() for file in foreign)
    assert cache.info()["chunks"] == 0
    assert not old.exists() or old in foreign
    assert run(encoder, tmp_path / "set", cache).encoded == 10  # works on after a clear
    with pytest.raises(ValueError, match="older_than"):
        cache.clear(older_than=-1)


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOOD_CACHE", str(tmp_path / "here"))
    assert FeatureCache().root == tmp_path / "here"
    monkeypatch.delenv("FASTOOD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert FeatureCache().root.name == "fastood"


def test_unwritable_folder_is_found_early(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CacheError, match="FASTOOD_CACHE"):
        FeatureCache(tmp_path / "file" / "cache")


def test_full_disk_is_reported(
    tmp_path: Path, encoder: ToyEncoder, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "set", 2)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match=r"No space left.*fastood cache clear"):
        run(encoder, tmp_path / "set", cache)
    assert not list((cache.root / "tmp").iterdir())
    assert not chunk_files(cache)


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.features.toy_encoder import ToyEncoder
from fastood.data import load_images
from fastood.features import FeatureCache, encode_images
print("ready", flush=True)
sys.stdin.readline()
found = encode_images(
    ToyEncoder(seconds=float(sys.argv[3])), load_images(sys.argv[1]), local=True, batch_size=2,
    cache=FeatureCache(sys.argv[2]),
    progress=lambda done, total, name: print(done, flush=True),
)
print("encoded", found.encoded, flush=True)
"""


def start(folder: Path, cache: Path, seconds: float) -> subprocess.Popen[str]:
    script = SCRIPT.format(root=str(Path(__file__).parents[2]))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(cache), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_killed_run_resumes_with_equal_bits(tmp_path: Path, encoder: ToyEncoder) -> None:
    files = write_images(tmp_path / "set", 60)
    files[21].write_bytes(b"broken")
    undisturbed = run(encoder, tmp_path / "set", None, local=True)
    root = tmp_path / "cache"
    with start(tmp_path / "set", root, 0.05) as process:
        go(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "30":
                process.kill()
                break
        assert process.wait() < 0
    cache = FeatureCache(root)
    kept = 4 * len(chunk_files(cache))
    assert 12 <= kept < 60
    resumed = run(encoder, tmp_path / "set", cache, local=True)
    assert resumed.encoded == sum(i != 21 for i in range(kept, 60))
    assert resumed.skipped == undisturbed.skipped
    assert resumed.paths == undisturbed.paths
    assert torch.equal(resumed.image(), undisturbed.image())
    assert torch.equal(
        torch.cat([c.local for c in resumed.blocks()]),
        torch.cat([c.local for c in undisturbed.blocks()]),
    )


def test_two_processes_write_the_same_chunks(tmp_path: Path, encoder: ToyEncoder) -> None:
    write_images(tmp_path / "set", 48)
    root = tmp_path / "cache"
    with (
        start(tmp_path / "set", root, 0.01) as one,
        start(tmp_path / "set", root, 0.01) as two,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        for process in (one, two):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in (one, two):
            go(process)
        outputs = [process.communicate()[0] for process in (one, two)]
    assert all("encoded" in output for output in outputs)
    assert one.returncode == two.returncode == 0
    cache = FeatureCache(root)
    assert len(chunk_files(cache)) == 12
    assert not list((root / "tmp").iterdir())
    found = run(encoder, tmp_path / "set", cache, local=True, verify=True)
    assert found.encoded == 0
    assert torch.equal(found.image(), run(encoder, tmp_path / "set", None, local=True).image())
