"""Hugging Face models: the same features as open_clip from the same weights; SigLIP's limits."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from fastood.errors import ModelError
from fastood.models import HFEncoder, OpenClipEncoder, load_model
from tests.models import tiny

transformers = pytest.importorskip("transformers")
PROMPTS = ["a cat", "a photo of a long-haired dachshund, a type of pet.", "dog"]
EOT = 49407


class ClipTokens:
    """open_clip's tokens through the interface of a Hugging Face tokenizer."""

    def __call__(self, texts, *, max_length, **options):
        del options
        return {"input_ids": tiny.TOKENIZER(texts, context_length=max_length)}


class Words:
    """One token per word, padded with 1, as SigLIP's tokenizer pads."""

    def __call__(self, texts, *, max_length, **options):
        del options
        rows = [[2 + sum(map(ord, w)) % 90 for w in t.split()][:max_length] for t in texts]
        return {"input_ids": torch.tensor([r + [1] * (max_length - len(r)) for r in rows])}


def clip_config(eos: int = EOT):
    shared = {"num_hidden_layers": 2, "intermediate_size": 128, "hidden_act": "quick_gelu"}
    return transformers.CLIPConfig(
        text_config={**shared, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 49408,
                     "max_position_embeddings": 77, "eos_token_id": eos, "bos_token_id": 49406},
        vision_config={**shared, "hidden_size": tiny.WIDTH, "num_attention_heads": tiny.HEADS,
                       "image_size": tiny.SIZE, "patch_size": tiny.PATCH},
        projection_dim=tiny.DIM,
    )  # fmt: skip


def hugging_face_names(model) -> dict[str, torch.Tensor]:
    """The weights of an open_clip model under the names of ``CLIPModel``."""
    own = {k: v.detach().clone() for k, v in model.state_dict().items()}
    out = {
        "logit_scale": own["logit_scale"],
        "visual_projection.weight": own["visual.proj"].T,
        "text_projection.weight": own["text_projection"].T,
        "vision_model.embeddings.class_embedding": own["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": own["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": own["visual.positional_embedding"],
        "text_model.embeddings.token_embedding.weight": own["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": own["positional_embedding"],
    }
    norms = {"vision_model.pre_layrnorm": "visual.ln_pre", "vision_model.post_layernorm":
             "visual.ln_post", "text_model.final_layer_norm": "ln_final"}  # fmt: skip
    linear = {}
    for there, here in (("vision_model", "visual.transformer"), ("text_model", "transformer")):
        for i in range(2):
            a, b = f"{there}.encoder.layers.{i}", f"{here}.resblocks.{i}"
            norms |= {f"{a}.layer_norm1": f"{b}.ln_1", f"{a}.layer_norm2": f"{b}.ln_2"}
            linear |= {f"{a}.mlp.fc1": f"{b}.mlp.c_fc", f"{a}.mlp.fc2": f"{b}.mlp.c_proj",
                       f"{a}.self_attn.out_proj": f"{b}.attn.out_proj"}  # fmt: skip
            for part in ("weight", "bias"):
                thirds = own[f"{b}.attn.in_proj_{part}"].chunk(3)
                for letter, third in zip("qkv", thirds, strict=True):
                    out[f"{a}.self_attn.{letter}_proj.{part}"] = third
    for there, here in {**norms, **linear}.items():
        for part in ("weight", "bias"):
            out[f"{there}.{part}"] = own[f"{here}.{part}"]
    return out


@pytest.fixture(scope="module")
def pair():
    source = tiny.clip(quick_gelu=True)
    model = transformers.CLIPModel(clip_config())
    model.load_state_dict(
        {k: v.contiguous() for k, v in hugging_face_names(source).items()}, strict=True
    )
    return (
        OpenClipEncoder(source, tiny.blank, tiny.TOKENIZER),
        HFEncoder(model, tiny.blank, ClipTokens()),
    )


def test_same_weights_same_features_in_both_libraries(pair):
    ours, theirs = pair
    pixels = tiny.pixels(3)
    a, b = ours.encode_image(pixels, local=True), theirs.encode_image(pixels, local=True)
    torch.testing.assert_close(a.image, b.image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.local, b.local, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.encode_image(pixels).image, b.image)
    x, y = (F.normalize(e.encode_text(PROMPTS), dim=-1) for e in pair)
    torch.testing.assert_close(x, y, atol=2e-6, rtol=0)
    assert theirs.logit_scale == pytest.approx(ours.logit_scale)
    assert theirs.num_patches == ours.num_patches == 9
    assert ours.fingerprint != theirs.fingerprint


@pytest.mark.parametrize("eos", [EOT, 2])
def test_cropped_text_equals_the_full_context(eos):
    config = clip_config(eos)
    config.text_config.hidden_act = "gelu"  # called as a module, so that a hook can count
    model = transformers.CLIPModel(config)
    tiny.shake(model)
    enc = HFEncoder(model, tiny.blank, ClipTokens())
    enc.encode_text(PROMPTS)
    seen = []
    model.text_model.encoder.layers[0].mlp.activation_fn.register_forward_hook(
        lambda m, a, out: seen.append(a[0].shape[:-1].numel())
    )
    got = F.normalize(enc.encode_text(PROMPTS), dim=-1)
    # the start token is common to all and runs once
    assert seen == [int((enc.tokenize(PROMPTS).argmax(-1) + 1).sum()) - len(PROMPTS) + 1]
    with torch.no_grad():
        out = model.get_text_features(input_ids=enc.tokenize(PROMPTS))
    full = F.normalize(getattr(out, "pooler_output", out), dim=-1)
    torch.testing.assert_close(got, full, atol=1e-6, rtol=0)


def test_tensor_and_output_object_are_both_understood(pair, monkeypatch):
    """transformers 4 returns a tensor where 5 returns an object."""
    _, theirs = pair
    pixels = tiny.pixels(2)
    expected = theirs.encode_image(pixels).image
    real = theirs.model.get_image_features

    def features(**inputs):
        out = real(**inputs)
        return getattr(out, "pooler_output", out)

    output = transformers.modeling_outputs.BaseModelOutputWithPooling
    for answer in (features, lambda **inputs: output(pooler_output=features(**inputs))):
        monkeypatch.setattr(theirs.model, "get_image_features", answer)
        assert torch.equal(theirs.encode_image(pixels).image, expected)


def siglip():
    shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 64}  # fmt: skip
    config = transformers.SiglipConfig(
        text_config={**shared, "vocab_size": 100, "max_position_embeddings": 16,
                     "projection_size": 32},
        vision_config={**shared, "image_size": tiny.SIZE, "patch_size": tiny.PATCH},
    )  # fmt: skip
    model = transformers.SiglipModel(config)
    tiny.shake(model)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-7.25)
    return model.eval()


def test_siglip_has_text_scale_and_bias_but_no_local():
    model = siglip()
    enc = HFEncoder(model, tiny.blank, Words())
    assert enc.logit_scale == pytest.approx(7.389056) and enc.logit_bias == -7.25
    assert enc.embed_dim == 32 and enc.text.context_length == 16 and not enc.text.croppable
    with pytest.raises(ModelError, match=r"SigLIP pools .* attention head"):
        enc.encode_image(tiny.pixels(1), local=True)
    pixels = tiny.pixels(2)
    with torch.no_grad():
        out = model(input_ids=enc.tokenize(PROMPTS), pixel_values=pixels)
    image, text = enc.encode_image(pixels).image, enc.encode_text(PROMPTS)
    logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    torch.testing.assert_close(
        logits * enc.logit_scale + enc.logit_bias, out.logits_per_image, atol=1e-5, rtol=1e-5
    )
    assert enc.encode_image(tiny.pixels(0)).image.shape == (0, 32)


def test_other_architectures_are_refused():
    config = transformers.CLIPVisionConfig(hidden_size=32, num_hidden_layers=1,
                                           num_attention_heads=2, intermediate_size=32)  # fmt: skip
    with pytest.raises(ModelError, match="CLIPModel or SiglipModel, got CLIPVisionModel"):
        HFEncoder(transformers.CLIPVisionModel(config), tiny.blank, ClipTokens())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    model = transformers.CLIPModel(clip_config())
    tiny.shake(model)
    model.save_pretrained(path)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": tiny.SIZE}, crop_size={"height": tiny.SIZE, "width": tiny.SIZE}
    ).save_pretrained(path)
    return path


def test_loads_a_local_folder_with_its_own_processor(folder):
    from PIL import Image

    enc = load_model(f"hf:{folder}", tokenizer=ClipTokens(), device="cpu")
    assert isinstance(enc, HFEncoder)
    again = load_model(str(folder), tokenizer=ClipTokens(), device="cpu")
    assert again.fingerprint == enc.fingerprint and again.preprocess_id == enc.preprocess_id
    assert "CLIPImageProcessor" in enc.preprocess_id
    pixels = enc.preprocess(Image.new("RGB", (50, 30), (255, 0, 0)))
    assert pixels.shape == (3, tiny.SIZE, tiny.SIZE)
    assert enc.encode_image(pixels[None], local=True).local.shape == (1, 9, tiny.DIM)


def test_weights_that_leave_parameters_random_are_refused(folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"leave 1 parameter\(s\) random.*visual_projection"):
        load_model(f"hf:{tmp_path}", tokenizer=ClipTokens(), device="cpu")


def test_damaged_weights_are_named(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ModelError, match="cannot be used"):
        load_model(f"hf:{tmp_path}", tokenizer=ClipTokens(), device="cpu")


def test_pickled_folder_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="allow_pickle=True"):
        load_model(f"hf:{tmp_path}", tokenizer=ClipTokens(), device="cpu")


def test_unsupported_folder_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match="model_type 'bert'"):
        load_model(f"hf:{tmp_path}", device="cpu")


def test_allowed_pickles_are_still_never_run(folder, tmp_path):
    from pathlib import Path

    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    weights = transformers.CLIPModel.from_pretrained(folder).state_dict()
    options = {"tokenizer": ClipTokens(), "device": "cpu", "allow_pickle": True}
    torch.save({**weights, "bomb": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_model(f"hf:{tmp_path}", **options)
    assert not (tmp_path / "exploded").exists()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    same = load_model(f"hf:{tmp_path}", **options).fingerprint
    assert same == load_model(f"hf:{folder}", tokenizer=ClipTokens(), device="cpu").fingerprint
