"""Names to encoders: the grammar, the refusals, and files that must not be unpickled."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastood.errors import ModelError, WeightsUnavailable
from fastood.models import OpenClipEncoder, files, list_models, load_model
from tests.models import tiny

NAME = "fastood-test-ViT"
CONFIG = {"embed_dim": tiny.DIM, "vision_cfg": tiny.vision(), "text_cfg": tiny.TEXT}


@pytest.fixture(scope="module", autouse=True)
def architecture(tmp_path_factory):
    """A tiny architecture, with a -quickgelu twin, among open_clip's own."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    (folder / f"{NAME}-quickgelu.json").write_text(json.dumps({**CONFIG, "quick_gelu": True}))
    open_clip.add_model_config(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No test may reach the network or a user's cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def weights(tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in tiny.clip().state_dict().items()}, path)
    return path


def load(name, **options) -> OpenClipEncoder:
    encoder = load_model(name, device="cpu", **options)
    assert isinstance(encoder, OpenClipEncoder)
    return encoder


def test_checkpoint_gives_the_saved_networks_features(weights):
    enc = load(NAME, checkpoint=weights, quick_gelu=False)
    pixels = tiny.pixels(2)
    with torch.no_grad():
        assert torch.equal(enc.encode_image(pixels).image, tiny.clip().encode_image(pixels))
    assert enc.name == f"{NAME}@weights.safetensors"
    assert load(NAME, pretrained=str(weights), quick_gelu=False).fingerprint == enc.fingerprint
    assert enc.preprocess(Image.new("RGB", (40, 30))).shape == (3, tiny.SIZE, tiny.SIZE)


def test_activation_of_a_bare_checkpoint_is_asked_for(weights):
    with pytest.warns(UserWarning, match="computing with GELU"):
        plain = load(NAME, checkpoint=weights)
    quick = load(f"{NAME}-quickgelu", checkpoint=weights)
    forced = load(NAME, checkpoint=weights, quick_gelu=True)
    assert quick.fingerprint == forced.fingerprint != plain.fingerprint
    pixels = tiny.pixels(1)
    assert torch.equal(quick.encode_image(pixels).image, forced.encode_image(pixels).image)


@pytest.mark.parametrize("stated", [True, False])
def test_openai_tag_computes_with_openais_activation(weights, monkeypatch, stated):
    """open_clip itself computes ViT-B-16/openai with GELU; older ones do not even know better."""
    from open_clip import pretrained

    tag = {**pretrained.get_pretrained_cfg("ViT-B-16", "openai"), "interpolation": "bilinear"}
    tag.pop("quick_gelu", None)
    if stated:
        tag["quick_gelu"] = True
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, {"openai": tag})
    enc = load(f"{NAME}/openai", checkpoint=weights)
    assert type(enc.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assert "bilinear" in enc.preprocess_id  # the tag's own preprocessing
    assert enc.name == f"{NAME}/openai@weights.safetensors"


@pytest.mark.parametrize("dtype", ["bf16", torch.float16])
def test_half_precision_keeps_norms_in_float32(weights, dtype):
    enc = load(NAME, checkpoint=weights, quick_gelu=False, dtype=dtype)
    full = load(NAME, checkpoint=weights, quick_gelu=False)
    assert enc.model.visual.ln_post.weight.dtype == torch.float32
    a = full.encode_image(tiny.pixels(2), local=True)
    b = enc.encode_image(tiny.pixels(2), local=True)
    assert b.image.dtype == b.local.dtype == enc.dtype != torch.float32
    for x, y in zip(a, b, strict=True):
        assert torch.nn.functional.cosine_similarity(x, y.float(), dim=-1).min() > 0.99
    text = torch.nn.functional.cosine_similarity(
        full.encode_text(["a cat"]), enc.encode_text(["a cat"]).float()
    )
    assert text.min() > 0.99


def test_random_weights_only_on_request_and_reproducibly():
    with pytest.raises(ModelError, match=r"names a network, not its weights.*random"):
        load(NAME)
    with pytest.raises(ModelError, match="ViT-B-16/openai"):
        load("ViT-B/16")
    state = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match="untrained weights"):
        a = load(NAME, pretrained="random")
    with pytest.warns(UserWarning, match="untrained weights"):
        b, c = load(f"{NAME}/random"), load(NAME, pretrained="random", seed=1)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert torch.equal(state, torch.random.get_rng_state())


def test_folder_in_open_clip_format(tmp_path, weights):
    folder = tmp_path / "model"
    folder.mkdir()
    settings = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    text = json.dumps({"model_cfg": CONFIG, "preprocess_cfg": settings})
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(WeightsUnavailable, match="no weights"):
        load(str(folder))
    weights.rename(folder / "open_clip_model.safetensors")
    enc = load(str(folder))
    assert "0.25" in enc.preprocess_id
    assert enc.fingerprint == OpenClipEncoder(tiny.clip(), tiny.blank, tiny.TOKENIZER).fingerprint
    with pytest.raises(ValueError, match=r"pretrained=openai.*brings its own"):
        load(str(folder), pretrained="openai")
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(ModelError, match="model_cfg"):
        load(str(folder))


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("ViT-B-16/opnai", "ViT-B-16/openai"),
        ("vit-b-16", "ViT-B-16"),
        ("fastood-tinny", "fastood-tiny"),
        ("timm:resnet5O", "timm:resnet50"),
    ],
)
def test_unknown_names_offer_close_ones(name, close):
    with pytest.raises(ModelError, match=close):
        load_model(name)


@pytest.mark.parametrize("reason", [None, "no route"])
def test_tokenizer_does_not_retry_without_a_network(monkeypatch, reason) -> None:
    from open_clip import tokenizer as kinds

    asked = []

    def fail(name, **options):
        asked.append(options.get("local_files_only", False))
        raise OSError("not here")

    monkeypatch.setattr(files, "no_network", lambda: reason)
    monkeypatch.setattr(kinds, "HFTokenizer", fail)
    with (
        pytest.warns(UserWarning, match="untrained"),
        pytest.raises(WeightsUnavailable, match="tokenizer timm/ViT-B-16-SigLIP"),
    ):
        load_model("ViT-B-16-SigLIP", pretrained="random", device="cpu")
    assert asked == [reason is not None]


def test_unreachable_weights_list_what_works_offline(tmp_path, monkeypatch):
    with pytest.raises(WeightsUnavailable) as caught:
        load("ViT-B-16/openai")
    for words in ("HF_HUB_OFFLINE", "checkpoint=", "local cache (none)", "fastood-tiny"):
        assert words in str(caught.value)
    for name in ("hf-hub:org/name", "hf:org/name", "timm:resnet50"):
        with pytest.raises(WeightsUnavailable, match="fastood-tiny"):
            load_model(name, device="cpu")
    cached = tmp_path / "hub" / "models--timm--vit_base_patch32_clip_224.openai"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "open_clip_model.safetensors").write_bytes(b"")
    monkeypatch.setattr(files, "no_network", lambda: "no route")
    with pytest.raises(WeightsUnavailable, match=r"no route.*local cache .*ViT-B-32/openai"):
        load("ViT-B-16/openai", cache_dir=None)


def test_missing_folders_are_not_taken_for_repositories():
    for name in ("hf:./not here", "hf-hub:./nowhere/at/all"):
        with pytest.raises(ModelError, match="neither a folder that exists"):
            load_model(name, device="cpu")


def test_name_resolution_fails_at_once_without_a_network(monkeypatch):
    import socket
    import time

    from huggingface_hub import constants

    def no_address(*args, **kwargs):
        raise OSError("name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    start = time.monotonic()
    with pytest.raises(WeightsUnavailable, match="not known"):
        load("ViT-B-16/openai")
    assert time.monotonic() - start < 5  # the Hub's client alone retries for over 20 s


def test_contradictions_are_refused(weights):
    with pytest.raises(ValueError, match="contradicts the tag"):
        load("ViT-B-16/openai", pretrained="laion2b_s34b_b88k")
    with pytest.raises(ValueError, match="exclude each other"):
        load(NAME, pretrained="random", checkpoint=weights)
    with pytest.raises(ModelError, match=r"no weights called 'opnai'.*openai"):
        load("ViT-B-16", pretrained="opnai")
    with pytest.raises(ModelError, match="say which architecture"):
        load(str(weights))
    with pytest.raises(ValueError, match="name"):
        load_model(" ")
    with pytest.raises(ValueError, match="dtype"):
        load_model(NAME, dtype="int8")
    with pytest.raises(ValueError, match="device"):
        load_model(NAME, device="gpu")


def test_checkpoints_that_do_not_fit_name_the_differences(tmp_path, weights):
    state = {k: v.contiguous() for k, v in tiny.clip().state_dict().items()}
    state["extra"] = torch.zeros(1)
    state["visual.proj"] = torch.zeros(3, 3)
    del state["ln_final.bias"]
    save_file(state, weights)
    with pytest.raises(ModelError) as caught:
        load(NAME, checkpoint=weights, quick_gelu=False)
    for words in ("1 missing (ln_final.bias)", "1 unknown (extra)", "visual.proj (3, 3) for"):
        assert words in str(caught.value)
    state = {k: v.contiguous() for k, v in tiny.clip().state_dict().items()}
    save_file({**state, "visual.proj": torch.zeros(3, 3)}, weights)
    with pytest.raises(ModelError, match=r"1 misshapen \(visual.proj \(3, 3\) for \(32, 16\)"):
        load(NAME, checkpoint=weights, quick_gelu=False)
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match="cut short"):
        load(NAME, checkpoint=weights, quick_gelu=False)
    with pytest.raises(WeightsUnavailable, match="no such file"):
        load(NAME, checkpoint=tmp_path / "missing.safetensors")


class Bomb:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_pickles_are_refused_and_never_run(tmp_path):
    good, bad, mark = tmp_path / "good.pt", tmp_path / "bad.pt", tmp_path / "exploded"
    state = tiny.clip().state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, good)
    torch.save({**state, "bomb": Bomb(mark)}, bad)
    options = {"quick_gelu": False}
    with pytest.raises(ModelError, match=r"got \.pt.*allow_pickle=True"):
        load(NAME, checkpoint=good, **options)
    enc = load(NAME, checkpoint=good, allow_pickle=True, **options)
    assert torch.equal(enc.model.visual.proj, state["visual.proj"])
    with pytest.raises(ModelError, match="weights_only=True"):
        load(NAME, checkpoint=bad, allow_pickle=True, **options)
    raw = tmp_path / "raw.bin"
    raw.write_bytes(pickle.dumps({"x": Bomb(mark)}))
    with pytest.raises(ModelError, match="weights_only=True"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on the pickle protocol
        files.read_state_dict(raw, allow_pickle=True)
    assert not mark.exists()
    disguised = tmp_path / "x.safetensors"
    disguised.write_bytes(raw.read_bytes())
    with pytest.raises(ModelError, match="not a readable safetensors"):
        files.read_state_dict(disguised, allow_pickle=True)
    assert not mark.exists()


def test_not_a_state_dict(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(2), path)
    with pytest.raises(ModelError, match="named tensors, got Tensor"):
        files.read_state_dict(path, allow_pickle=True)
    torch.save({"epoch": 3}, path)
    with pytest.raises(ModelError, match="not tensors: epoch"):
        files.read_state_dict(path, allow_pickle=True)
    with pytest.raises(ModelError, match=r"got \.onnx"):
        files.read_state_dict(tmp_path / "x.onnx", allow_pickle=True)


def test_list_models_looks_at_the_cache_only(tmp_path):
    models = list_models()
    assert models[0].name == "fastood-tiny" and models[0].cached
    names = {m.name for m in models}
    assert {"ViT-B-16/openai", "RN50/openai"} <= names and len(names) > 50
    assert [m.name for m in list_models(cached_only=True)] == ["fastood-tiny"]
    assert not any(m.cached for m in models[1:])


def test_every_published_tag_resolves_without_pickle_surprises():
    """Each tag names either a Hub repository or an address whose format is known beforehand."""
    for model in list_models()[1:]:
        assert model.source, model.name


def test_importing_the_package_imports_no_library():
    code = (
        "import sys, fastood.models as m, fastood.features.text, fastood.data.prompts; "
        "assert m.Encoder; "
        "bad = {'open_clip', 'transformers', 'timm', 'torchvision'} & set(sys.modules); "
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_bundled_model_needs_nothing():
    enc = load("fastood-tiny")
    assert enc.name == "fastood-tiny" and enc.no_local is None and enc.text.croppable
    picture = Image.new("RGB", (60, 40), (200, 30, 30))
    pixels = enc.preprocess(picture)[None]
    out = enc.encode_image(pixels, local=True)
    assert out.local.shape == (1, enc.num_patches, enc.embed_dim)
    half = load_model("fastood-tiny", device="cpu", dtype="bf16").encode_image(pixels)
    assert torch.nn.functional.cosine_similarity(half.image.float(), out.image).item() > 0.99
    assert enc.warn_prompts(["a photo of a dress"]) == []
    assert "xylophone" in enc.warn_prompts(["a photo of a xylophone"])[0]
    for options in ({"pretrained": "openai"}, {"checkpoint": "x.safetensors"}):
        with pytest.raises(ValueError, match="brings its own"):
            load_model("fastood-tiny", device="cpu", **options)
