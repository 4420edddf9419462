"""Towers run block by block, with candidates' weights, against models that have those weights."""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.errors import ModelError
from fastood.models import CallableEncoder, HFEncoder, OpenClipEncoder
from fastood.models.base import Encoder
from fastood.models.matrices import KINDS, Matrix, find
from fastood.setar.lowrank import LowRankBasis
from fastood.setar.tails import Tails
from fastood.setar.towers import steps as blocks
from fastood.setar.towers.base import ImageTower, Seen, image_tower
from fastood.setar.towers.text import TextParts
from tests import tolerances
from tests.models import tiny

LAYERS = 3
COUNTS = (2, 5, 9)
PIXELS = tiny.pixels(4)
ONE = [["a photo of a cat.", "a photo of a long-haired dachshund.", "a photo of a dog."]]
THREE = [
    [t.format(name) for name in ("cat", "dog", "long-haired dachshund", "dog")]
    for t in ("a photo of a {}.", "a drawing of the {}", "{}")
]


def open_clip(dtype: torch.dtype = torch.float64, **options) -> OpenClipEncoder:
    image = tiny.vision(layers=LAYERS, **options.pop("image", {}))
    text = {"layers": LAYERS, **options.pop("text", {})}
    model = tiny.clip(image, text, **{"quick_gelu": True, **options}).to(dtype)
    return OpenClipEncoder(model, tiny.blank, tiny.TOKENIZER)


def hugging_face(dtype: torch.dtype = torch.float64) -> HFEncoder:
    pytest.importorskip("transformers")
    from tests.models import test_hf

    config = test_hf.clip_config()
    for part in (config.vision_config, config.text_config):
        part.num_hidden_layers = LAYERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = test_hf.transformers.CLIPModel(config)
    tiny.shake(model)
    model = model.to(dtype)
    try:
        model.get_text_features(input_ids=tiny.TOKENIZER(["a"]))
    except RuntimeError as error:
        if "without overflow" not in str(error):
            raise
        pytest.skip(f"the installed transformers has no {dtype} masks: {error}")
    return HFEncoder(model, tiny.blank, test_hf.ClipTokens())


def without_key_biases(dtype: torch.dtype = torch.float64) -> HFEncoder:
    encoder = hugging_face(dtype)
    for module in encoder.model.modules():
        if hasattr(module, "k_proj"):
            module.k_proj.bias = None
    return encoder


def without_biases(dtype: torch.dtype = torch.float64) -> OpenClipEncoder:
    encoder = open_clip(dtype)
    for layers in (encoder.model.visual.transformer.resblocks, encoder.model.transformer.resblocks):
        for block in layers:
            block.attn.in_proj_bias = None
            block.attn.out_proj.bias = block.mlp.c_fc.bias = block.mlp.c_proj.bias = None
    return encoder


ENCODERS = {
    "open_clip": open_clip,
    "gelu": lambda **o: open_clip(quick_gelu=False, **o),
    "layer scale": lambda **o: open_clip(
        image={"ls_init_value": 0.3}, text={"ls_init_value": 0.3}, **o
    ),
    "no biases": without_biases,
    "custom text": lambda **o: open_clip(custom=True, **o),
    "hugging face": hugging_face,
    "no key biases": without_key_biases,
}

each_encoder = pytest.mark.parametrize("name", ENCODERS)


@lru_cache
def encoder_of(name: str, dtype: torch.dtype = torch.float64) -> Encoder:
    """For tests that leave its weights as they were."""
    return ENCODERS[name](dtype=dtype)


def matrices(encoder: Encoder, tower: str) -> list[Matrix]:
    return list(find(encoder.text_module(), towers=tower))


@contextmanager
def dropped(encoder: Encoder, matrix: Matrix, basis: LowRankBasis, count: int, **how):
    """``encoder`` with the candidate's weight inside the block."""
    weight = matrix.weight(encoder.text_module())
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(basis.drop(count, **how))
        yield encoder
        weight.copy_(before)


def basis_of(encoder: Encoder, matrix: Matrix) -> LowRankBasis:
    return LowRankBasis(matrix.weight(encoder.text_module()))


def tails_of(encoder: Encoder, basis: LowRankBasis, counts: tuple[int, ...] = COUNTS) -> Tails:
    return Tails.of(basis, counts, dtype=encoder.dtype, device="cpu")


def rtol(encoder: Encoder) -> float:
    exact = encoder.dtype == torch.float64
    return tolerances.TOWER_F64_RTOL if exact else tolerances.TOWER_RTOL


def close(encoder: Encoder, got: Tensor, want: Tensor) -> bool:
    assert got.shape == want.shape and got.dtype == want.dtype and not got.requires_grad
    return float((got - want).abs().max() / want.abs().max()) <= rtol(encoder)


# ------------------------------------------------------------------------------ images


def inputs(tower: ImageTower, pixels: Tensor) -> list[Tensor]:
    """x_0 ... x_{L-1}"""
    found = [tower.start(pixels)]
    for i in range(tower.depth - 1):
        found.append(tower.block(i, found[-1]))
    return found


def seen_by(tower: ImageTower, matrix: Matrix, tails: Tails, pixels: Tensor) -> list[Seen]:
    """Of all candidates, copied before the next one is asked for."""
    last = tower.depth - 1
    xs = inputs(tower, pixels)
    before = [x.clone() for x in xs]
    found = []
    if matrix.layer in (None, last):
        for seen in tower.seen_variants(matrix, tails, xs[-1]):
            found.append(Seen(seen.image.clone(), seen.local.clone()))
    else:
        for x in tower.variants(matrix, tails, xs[matrix.layer]):
            for i in range(matrix.layer + 1, last):
                x = tower.block(i, x)
            found.append(tower.seen(x))
    for x, y in zip(xs, before, strict=True):
        assert torch.equal(x, y), "an input was written to"
    return found


@each_encoder
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_blocks_make_the_model(name, dtype):
    encoder = encoder_of(name, dtype)
    tower = image_tower(encoder)
    assert tower.depth == LAYERS and tower.head() is None
    seen = tower.seen(inputs(tower, PIXELS)[-1])
    whole = encoder.encode_image(PIXELS, local=True)
    assert close(encoder, seen.image, whole.image)
    assert close(encoder, seen.local, whole.local)


@each_encoder
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_of_the_image_tower(name, kind):
    encoder = encoder_of(name)
    tower = image_tower(encoder)
    for matrix in matrices(encoder, "image"):
        if matrix.kind != kind:
            continue
        basis = basis_of(encoder, matrix)
        found = seen_by(tower, matrix, tails_of(encoder, basis), PIXELS)
        assert len(found) == len(COUNTS)
        plain = encoder.encode_image(PIXELS, local=True)
        for count, seen in zip(COUNTS, found, strict=True):
            with dropped(encoder, matrix, basis, count):
                want = encoder.encode_image(PIXELS, local=True)
            assert close(encoder, seen.image, want.image), (matrix.address, count)
            assert close(encoder, seen.local, want.local), (matrix.address, count)
            assert not close(encoder, seen.image, plain.image)
            # the last block's queries and keys have no part in the value path
            same = matrix.layer == LAYERS - 1 and kind in ("q", "k")
            assert close(encoder, seen.local, plain.local) == same, matrix.address


@pytest.mark.parametrize("name", ["open_clip", "hugging face"])
def test_candidates_of_the_image_tower_in_float32(name):
    encoder = encoder_of(name, torch.float32)
    tower = image_tower(encoder)
    for matrix in matrices(encoder, "image"):
        basis = basis_of(encoder, matrix)
        found = seen_by(tower, matrix, tails_of(encoder, basis, (5,)), PIXELS)
        with dropped(encoder, matrix, basis, 5):
            want = encoder.encode_image(PIXELS, local=True)
        assert close(encoder, found[0].image, want.image), matrix.address
        assert close(encoder, found[0].local, want.local), matrix.address


def test_attention_under_its_older_names():
    """transformers 4.45 has a class for each way to compute it."""
    encoder = hugging_face()
    for module in encoder.model.modules():
        if hasattr(module, "k_proj"):
            module.__class__ = type("CLIPSdpaAttention", (type(module),), {})
    tower, whole = image_tower(encoder), encoder.encode_image(PIXELS, local=True)
    assert close(encoder, tower.seen(inputs(tower, PIXELS)[-1]).image, whole.image)
    assert close(encoder, features(TextParts(encoder, ONE)), classes(encoder, ONE))


def test_attention_whose_softmax_is_taken_in_float32():
    """Hugging Face's "eager" attention, in a model of float64."""
    encoder = hugging_face()
    for part in (encoder.model.config, *vars(encoder.model.config).values()):
        if hasattr(part, "_attn_implementation"):
            part._attn_implementation = "eager"
    tower, text = image_tower(encoder), TextParts(encoder, ONE)
    seen, whole = tower.seen(inputs(tower, PIXELS)[-1]), encoder.encode_image(PIXELS, local=True)
    for got, want in ((seen.image, whole.image), (features(text), classes(encoder, ONE))):
        assert float((got - want).abs().max() / want.abs().max()) <= tolerances.TOWER_EAGER_RTOL


def test_random_and_principal_parts_go_through_the_tower():
    encoder = open_clip()
    tower = image_tower(encoder)
    matrix = next(m for m in matrices(encoder, "image") if m.address == "image.1.up")
    basis = LowRankBasis(matrix.weight(encoder.model))
    for part in ("random", "principal"):
        tails = Tails.of(basis, (3, 8), part=part, seed=5, dtype=torch.float64, device="cpu")
        found = seen_by(tower, matrix, tails, PIXELS)
        for count, seen in zip((3, 8), found, strict=True):
            with dropped(encoder, matrix, basis, count, part=part, seed=5):
                want = encoder.encode_image(PIXELS, local=True)
            assert close(encoder, seen.image, want.image), part
            assert close(encoder, seen.local, want.local), part


@each_encoder
def test_changed_weights_are_seen_at_once(name):
    encoder = ENCODERS[name]()
    tower, text = image_tower(encoder), TextParts(encoder, ONE)
    tower.seen(inputs(tower, PIXELS)[-1])
    features(text)
    for part in ("image", "text"):
        for matrix in matrices(encoder, part):
            before = tower.seen(inputs(tower, PIXELS)[-1]).image, features(text)
            with torch.no_grad():
                matrix.weight(encoder.model).mul_(0.9)
            seen = tower.seen(inputs(tower, PIXELS)[-1])
            whole = encoder.encode_image(PIXELS, local=True)
            assert close(encoder, seen.image, whole.image), matrix.address
            assert close(encoder, seen.local, whole.local), matrix.address
            assert close(encoder, features(text), classes(encoder, ONE)), matrix.address
            moved = seen.image if part == "image" else features(text)
            assert not torch.equal(before[part == "text"], moved), matrix.address


@pytest.mark.parametrize("name", ENCODERS)
def test_slices_change_nothing(name, monkeypatch):
    """Towers of this size are run in one piece unless the limit is low."""
    encoder = encoder_of(name)
    tower, text = image_tower(encoder), TextParts(encoder, THREE)
    before = tower.seen(inputs(tower, PIXELS)[-1]), features(text)
    named = {m.address: m for m in find(encoder.text_module())}
    matrix = named["image.1.up"], named["text.1.up"]
    tails = [tails_of(encoder, basis_of(encoder, m)) for m in matrix]
    candidates = seen_by(tower, matrix[0], tails[0], PIXELS), features_of(text, matrix[1], tails[1])
    for limit in (10 * 128 * 8, 23 * 128 * 8, 1):  # an image, two, a row
        monkeypatch.setattr(blocks, "_SLICE_BYTES", limit)
        after = tower.seen(inputs(tower, PIXELS)[-1])
        assert close(encoder, after.image, before[0].image)
        assert close(encoder, after.local, before[0].local)
        assert close(encoder, features(text), before[1])
        again = seen_by(tower, matrix[0], tails[0], PIXELS)
        for a, b in zip(again, candidates[0], strict=True):
            assert close(encoder, a.image, b.image) and close(encoder, a.local, b.local)
        for x, y in zip(features_of(text, matrix[1], tails[1]), candidates[1], strict=True):
            assert close(encoder, x, y)


def test_images_can_be_cut_anywhere():
    encoder = open_clip()
    tower = image_tower(encoder)
    whole = inputs(tower, PIXELS)
    cut = [inputs(tower, some) for some in PIXELS.split([1, 3])]
    for x, parts in zip(whole, zip(*cut, strict=True), strict=True):
        assert close(encoder, torch.cat(parts), x)


def test_a_transformer_that_wants_tokens_first():
    from open_clip.transformer import QuickGELU, Transformer

    encoder = open_clip()
    visual = encoder.model.visual
    other = Transformer(
        tiny.WIDTH, LAYERS, tiny.HEADS, act_layer=QuickGELU, batch_first=False
    ).double()
    other.load_state_dict(visual.transformer.state_dict())
    whole = encoder.encode_image(PIXELS, local=True)
    visual.transformer = other.eval()
    tower = image_tower(encoder)
    xs = inputs(tower, PIXELS)
    assert xs[0].shape == (4, 10, tiny.WIDTH)
    seen = tower.seen(xs[-1])
    assert close(encoder, seen.image, whole.image) and close(encoder, seen.local, whole.local)


def test_no_hook_is_left_behind():
    encoder = open_clip()
    tower = image_tower(encoder)
    tower.start(PIXELS)
    assert not any(m._forward_pre_hooks for m in encoder.model.modules())


# -------------------------------------------------------------------------------- texts


def classes(encoder: Encoder, prompts: list[list[str]]) -> Tensor:
    """(K, D) by the model's own full pass."""
    with torch.no_grad():
        each = [
            F.normalize(encoder.encode_tokens(encoder.tokenize(row)), dim=-1) for row in prompts
        ]
    return F.normalize(torch.stack(each).mean(dim=0), dim=-1)


def states(text: TextParts) -> list[Tensor]:
    found = [text.start()]
    for i in range(text.depth - 1):
        found.append(text.block(i, found[-1]))
    return found


def features(text: TextParts) -> Tensor:
    return text.features(states(text)[-1])


def features_of(text: TextParts, matrix: Matrix, tails: Tails) -> list[Tensor]:
    last = text.depth - 1
    if matrix.layer in (None, last):
        state = states(text)[-1]
        return [x.clone() for x in text.feature_variants(matrix, tails, state)]
    found = []
    for state in text.variants(matrix, tails, states(text)[matrix.layer]):
        for i in range(matrix.layer + 1, last):
            state = text.block(i, state)
        found.append(text.features(state))
    return found


@each_encoder
@pytest.mark.parametrize("prompts", [ONE, THREE], ids=["one template", "three"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_texts_are_the_models(name, prompts, dtype):
    encoder = encoder_of(name, dtype)
    text = TextParts(encoder, prompts)
    got = features(text)
    assert close(encoder, got, classes(encoder, prompts))
    assert text.depth == LAYERS
    if prompts is THREE:
        assert torch.equal(got[1], got[3])  # one class twice
    whole = int(
        text._tower.ends(encoder.tokenize([p for row in prompts for p in row])).add(1).sum()
    )
    assert text.tokens < whole  # what prompts share is run once


@each_encoder
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_of_the_text_tower(name, kind):
    encoder = encoder_of(name)
    for prompts in (ONE, THREE) if name == "open_clip" else (THREE,):
        text, plain = TextParts(encoder, prompts), classes(encoder, prompts)
        for matrix in matrices(encoder, "text"):
            if matrix.kind != kind:
                continue
            basis = basis_of(encoder, matrix)
            found = features_of(text, matrix, tails_of(encoder, basis))
            assert len(found) == len(COUNTS)
            for count, got in zip(COUNTS, found, strict=True):
                with dropped(encoder, matrix, basis, count):
                    want = classes(encoder, prompts)
                assert close(encoder, got, want), (matrix.address, count)
                assert not close(encoder, got, plain), matrix.address


def test_one_class_and_prompts_that_share_nothing():
    encoder = open_clip()
    for prompts in ([["a cat"]], [["cat", "a dog", "the long-haired dachshund", "cat"]]):
        assert close(encoder, features(TextParts(encoder, prompts)), classes(encoder, prompts))


# ------------------------------------------------------------------------------ refusals


def refused(words: str):
    return pytest.raises(ModelError, match=words)


def test_resnets_are_refused_with_the_reason():
    encoder = OpenClipEncoder(tiny.clip(tiny.RESNET), tiny.blank, tiny.TOKENIZER)
    with refused("changes the weights of transformer blocks; its image tower is a ModifiedResNet"):
        image_tower(encoder)
    # its text tower is a transformer
    assert close(encoder, features(TextParts(encoder, ONE)), classes(encoder, ONE))


def test_pooling_without_a_class_token_is_refused_with_the_reason():
    with refused("needs patch features: the image tower pools with pool_type='avg'"):
        image_tower(open_clip(image={"pool_type": "avg"}))


def test_unknown_blocks_are_refused_with_the_reason():
    class Own(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.attn, self.mlp = inner.attn, inner.mlp

        def forward(self, x: Tensor, **options) -> Tensor:
            return self.inner(x, **options)

    encoder = open_clip()
    for layers in (encoder.model.visual.transformer.resblocks, encoder.model.transformer.resblocks):
        layers[1] = Own(layers[1])
    with refused(r"image tower cannot be taken apart: its blocks \(Own\)"):
        image_tower(encoder)
    with refused(r"text tower cannot be taken apart: its blocks \(Own\)"):
        TextParts(encoder, ONE)


def test_towers_that_compute_something_else_are_refused():
    encoder = open_clip()
    encoder.model.visual.ln_post.register_forward_hook(lambda m, i, y: 1.1 * y)
    encoder.model.ln_final.register_forward_hook(lambda m, i, y: 1.1 * y)
    with refused("taken apart, its image features differ from the model's own by"):
        image_tower(encoder)
    with refused("taken apart, its text features differ from the model's own by"):
        TextParts(encoder, ONE)


def test_texts_that_see_behind_their_end_are_refused():
    encoder = open_clip(text={"no_causal_mask": True}, custom=True)
    with refused("its attention is not causal"):
        TextParts(encoder, ONE)


def test_half_precision_is_refused():
    encoder = open_clip(dtype=torch.bfloat16)
    for make in (lambda: image_tower(encoder), lambda: TextParts(encoder, ONE)):
        with refused("float32 or float64 weights, got torch.bfloat16"):
            make()


def test_encoders_without_parts_are_refused():
    encoder = CallableEncoder(
        lambda x: x.flatten(1)[:, :8],
        tiny.blank,
        embed_dim=8,
        fingerprint="x",
        preprocess_id="x",
    )
    with refused("needs patch features"):
        image_tower(encoder)
    with refused("text tower cannot be taken apart: it has none"):
        TextParts(encoder, ONE)


@pytest.mark.parametrize("prompts", [[], [[]], [["a"], ["a", "b"]], ["a", "b"]])
def test_prompts_that_are_no_table(prompts):
    with pytest.raises(ValueError, match="prompts: expected a list for each template"):
        TextParts(open_clip(), prompts)


def test_matrices_of_other_layers_and_towers():
    encoder = open_clip()
    tower, text = image_tower(encoder), TextParts(encoder, ONE)
    named = {m.address: m for m in find(encoder.model)}
    x, state = inputs(tower, PIXELS), states(text)
    tails = tails_of(encoder, basis_of(encoder, named["image.0.up"]))
    for address in ("image.2.up", "image.proj", "text.0.up"):
        with pytest.raises(ValueError, match=r"image tower, layers 0\.\.1, got"):
            tower.variants(named[address], tails, x[0])
    with pytest.raises(ValueError, match=r"image tower, layers 2\.\.2, or proj, got image\.0"):
        tower.seen_variants(named["image.0.up"], tails, x[-1])
    with pytest.raises(ValueError, match=r"text tower, layers 0\.\.1, got image\.0\.up"):
        text.variants(named["image.0.up"], tails, state[0])
    with pytest.raises(ValueError, match=r"text tower, layers 2\.\.2, or proj"):
        text.feature_variants(named["text.1.up"], tails, state[-1])
