"""What a search compares candidates by, against the definition written out image by image."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastood.setar.objective import METRICS, SCORES, Objective, Tally, Value
from tests import tolerances

F64 = {"rtol": tolerances.OBJECTIVE_F64_RTOL, "atol": tolerances.OBJECTIVE_F64_RTOL}


class Data:
    """Random images, patches and classes; labels that are neither the best class nor the worst."""

    def __init__(self, n=13, p=9, k=11, d=6, *, seed=0, bias=False, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)

        def unit(*shape: int) -> Tensor:
            return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)

        self.weight = (12 * unit(k, d)).to(dtype)
        self.local = unit(n, p, d).to(dtype)
        self.bias = torch.randn(k, generator=g, dtype=torch.float64).to(dtype) if bias else None
        self.logits = self.of(unit(n, d).to(dtype))
        self.labels = self.logits.topk(3, dim=1).indices[
            torch.arange(n), torch.randint(0, 3, (n,), generator=g)
        ]

    def of(self, features: Tensor) -> Tensor:
        s = features @ self.weight.T
        return s if self.bias is None else s + self.bias

    @property
    def patches(self) -> Tensor:
        return self.of(self.local)

    def tally(self, objective: Objective, batches: list[int], *, chunk: int = 100) -> Tally:
        tally = objective.tally(self.labels, batches)
        for a in range(0, len(self.labels), chunk):
            part = slice(a, a + chunk)
            tally.add(a, self.logits[part], self.local[part], self.weight, self.bias)
        return tally

    def value(self, objective: Objective, batches: list[int], *, chunk: int = 100) -> Value:
        return self.tally(objective, batches, chunk=chunk).value()


def ood_patches(objective: Objective, data: Data) -> Tensor:
    """(N, P) bool, by a stable sort of every patch: equal logits keep the order of classes."""
    labels = data.logits.argmax(dim=1) if objective.pred_label else data.labels
    order = data.patches.sort(dim=-1, descending=True, stable=True).indices
    return ~(order[..., : objective.top_k] == labels[:, None, None]).any(dim=-1)


def terms(objective: Objective, data: Data, batches: list[int]) -> dict[str, float]:
    """The loss from its definition, a batch at a time."""
    n = len(data.labels)
    found = {"loss": 0.0, "cross_entropy": 0.0, "patches": 0.0}
    ood = ood_patches(objective, data)
    for rows in torch.arange(n).split(batches):
        entropy = F.cross_entropy(data.logits[rows], data.labels[rows])
        p = data.patches[rows][ood[rows]].softmax(dim=-1)
        term = (p * torch.log(p + 1e-5)).sum(dim=1).mean() if len(p) else torch.zeros(())
        share = len(rows) / n
        found["cross_entropy"] += share * float(entropy)
        found["patches"] += share * float(term)
        found["loss"] += share * float(entropy + objective.weight * term)
    return found


def one_score(score: str, own: Tensor, local: Tensor, temperature: float) -> float:
    """Score of an image with logits ``own (K,)`` and patches ``local (P, K)``, higher = ID."""
    p, of_local = (x.div(temperature).softmax(dim=-1).numpy() for x in (own, local))
    if score == "energy":
        return temperature * math.log(np.exp(own.numpy() / temperature).sum())
    if score == "entropy":
        return float((p * np.log(p)).sum())
    if score == "variance":
        return float(np.var(p))
    return {
        "mcm": p.max(),
        "l_mcm": of_local.max(),
        "gl_mcm": p.max() + of_local.max(),
    }[score]


def scores_of(objective: Objective, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the images, and of their OOD patches each taken for an image."""
    ood = ood_patches(objective, data)
    images, patches = [], []
    assert objective.score is not None
    for own, local, out in zip(data.logits, data.patches, ood, strict=True):
        images.append(one_score(objective.score, own, local, objective.temperature))
        patches += [
            one_score(objective.score, x, local[out], objective.temperature) for x in local[out]
        ]
    return np.array(images), np.array(patches)


def metrics_of(images: np.ndarray, patches: np.ndarray) -> dict[str, float]:
    """AUROC, average precision and FPR at the recall nearest to 95 %, ID positive, by counting."""
    wins = (images[:, None] > patches).mean() + (images[:, None] == patches).mean() / 2
    curve = [
        ((images >= t).sum(), (patches >= t).sum())
        for t in np.unique(np.concatenate((images, patches)))[::-1]
    ]
    area = before = 0.0
    for accepted, wrong in curve:
        area += (accepted - before) / len(images) * accepted / (accepted + wrong)
        before = accepted
    full = next(i for i, (accepted, _) in enumerate(curve) if accepted == len(images))
    recalls = np.array([curve[i][0] / len(images) for i in range(full, -1, -1)])
    nearest = full - int(np.argmin(np.abs(recalls - 0.95)))
    return {"auroc": wins, "aupr": area, "fpr": curve[nearest][1] / len(patches)}


@pytest.mark.parametrize("pred_label", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 4, 10])
@pytest.mark.parametrize("batches", [[13], [5, 5, 3], [1] * 13])
def test_loss_is_the_mean_over_batches(batches, top_k, bias, pred_label):
    data = Data(bias=bias, seed=top_k)
    objective = Objective("loss", top_k=top_k, weight=0.3, pred_label=pred_label)
    value = data.value(objective, batches)
    want = terms(objective, data, batches)
    for name, number in want.items():
        assert getattr(value, name) == pytest.approx(number, rel=F64["rtol"], abs=F64["atol"])
        assert data.value(Objective(name, top_k=top_k, weight=0.3), batches).objective == getattr(
            data.value(Objective(top_k=top_k, weight=0.3), batches), name
        )
    ood = ood_patches(objective, data)
    assert value.objective == value.loss
    assert value.ood_patches == int(ood.sum())
    assert value.ood_share == pytest.approx(float(ood.double().mean()))
    assert value.empty_batches == sum(not part.any() for part in ood.split(batches))
    assert value.accuracy == float((data.logits.argmax(dim=1) == data.labels).double().mean())
    assert value.ties == 0
    assert value.scores == {}


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("score", SCORES)
def test_metrics_set_images_against_their_ood_patches(score, temperature):
    data = Data(n=21, bias=score == "energy", seed=5)
    for metric in ("auroc", "aupr", "fpr"):
        objective = Objective(metric, score, top_k=4, temperature=temperature)
        value = data.value(objective, [21], chunk=4)
        want = metrics_of(*scores_of(objective, data))
        assert value.scores == {score: pytest.approx(want)}
        assert value.objective == pytest.approx(want[metric])
        assert value.loss == pytest.approx(terms(objective, data, [21])["loss"])


def test_metrics_agree_with_scikit_learn():
    sk = pytest.importorskip("sklearn.metrics")
    objective = Objective("auroc", "gl_mcm", top_k=3)
    data = Data(n=30, seed=3)
    images, patches = scores_of(objective, data)
    positive = np.arange(len(images) + len(patches)) < len(images)
    both = np.concatenate((images, patches))
    found = data.value(objective, [30]).scores["gl_mcm"]
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(positive, both))
    assert found["aupr"] == pytest.approx(sk.average_precision_score(positive, both))


@pytest.mark.parametrize("score", [None, *SCORES])
def test_chunks_do_not_matter(score):
    data = Data(n=17, seed=2)
    objective = Objective("auroc" if score else "loss", score, top_k=4)
    whole = data.value(objective, [7, 6, 4])
    for chunk in (1, 2, 5, 16):
        value = data.value(objective, [7, 6, 4], chunk=chunk)
        for name in ("loss", "cross_entropy", "patches", "objective"):
            assert getattr(value, name) == pytest.approx(getattr(whole, name), rel=1e-12, abs=1e-12)
        assert (value.ood_patches, value.ties) == (whole.ood_patches, whole.ties)
    backwards = objective.tally(data.labels, [7, 6, 4])
    for a in range(16, -1, -1):
        part = slice(a, a + 1)
        backwards.add(a, data.logits[part], data.local[part], data.weight)
    assert backwards.value().loss == pytest.approx(whole.loss, rel=1e-12)


def test_more_patches_than_a_block_of_logits():
    data = Data(n=3, p=700, k=400, d=4, seed=1)
    objective = Objective(top_k=120)
    want = terms(objective, data, [2, 1])["loss"]
    assert data.value(objective, [2, 1]).loss == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("pred_label", [False, True])
def test_of_equal_logits_the_first_class_comes_first(dtype, pred_label):
    data = Data(n=6, p=40, k=12, d=5, dtype=dtype)
    data.weight[6:] = data.weight[:6]  # every class twice: logits equal to the last bit
    data.logits = data.of(data.local[:, 0])
    data.labels = torch.tensor([0, 6, 3, 9, 5, 11])
    for top_k in (1, 2, 3, 6, 11):
        objective = Objective(top_k=top_k, pred_label=pred_label)
        value = data.value(objective, [6], chunk=4)
        ood = ood_patches(objective, data)
        assert value.ood_patches == int(ood.sum())
        # a pair straddles the cut of an odd k for whichever patches rank the label there
        labels = data.logits.argmax(dim=1) if pred_label else data.labels
        own = data.patches.gather(-1, labels[:, None, None].expand(-1, 40, 1))
        above = (data.patches > own).sum(dim=-1)
        assert value.ties == int(((above < top_k) & (above + 2 > top_k)).sum())
    assert value.ties > 0


def test_a_batch_without_ood_patches_adds_nothing_and_is_counted():
    data = Data(n=8, p=5, k=6, seed=4)
    data.local[:4] = F.normalize(data.weight[data.labels[:4]], dim=1)[:, None]  # sure of the label
    objective = Objective(top_k=2, weight=0.5)
    value = data.value(objective, [4, 4])
    assert value.empty_batches == 1
    alone = Data(n=8, p=5, k=6, seed=4)
    alone.logits, alone.local = data.logits[4:], data.local[4:]
    alone.labels = data.labels[4:]
    second = alone.value(objective, [4])
    assert second.patches < 0
    assert value.patches == pytest.approx(second.patches / 2)
    # one batch of all: the mean is over the same patches, but no longer halved
    assert data.value(objective, [8]).patches == pytest.approx(second.patches)


def test_without_any_ood_patch_a_metric_has_its_worst_value():
    data = Data(n=4, p=5, k=6)
    data.local[:] = F.normalize(data.weight[data.labels], dim=1)[:, None]
    for metric, worst in (("auroc", 0.0), ("aupr", 0.0), ("fpr", 1.0)):
        value = data.value(Objective(metric, "mcm", top_k=2), [4])
        assert (value.ood_patches, value.objective, value.scores) == (0, worst, {})
    value = data.value(Objective(top_k=2), [2, 2])
    assert (value.patches, value.empty_batches, value.loss) == (0.0, 2, value.cross_entropy)


def test_float32_is_near_float64():
    exact = Data(n=6, p=30, k=200, d=16, seed=7)
    short = Data(n=6, p=30, k=200, d=16, seed=7, dtype=torch.float32)
    short.labels = exact.labels
    objective = Objective(top_k=40)
    want, found = exact.value(objective, [4, 2]), short.value(objective, [4, 2])
    assert found.ood_patches == want.ood_patches
    assert found.loss == pytest.approx(want.loss, rel=tolerances.OBJECTIVE_RTOL)


@pytest.mark.parametrize("metric", METRICS)
def test_better_is_strict(metric):
    objective = Objective(metric, "mcm" if metric in ("auroc", "aupr", "fpr") else None, top_k=2)
    low, high = (Value(x, 0, 0, 0, 0, 0, 0, 0, 0) for x in (0.25, 0.5))
    up = metric in ("auroc", "aupr")
    assert objective.better(high, low) is up
    assert objective.better(low, high) is not up
    assert not objective.better(low, low)
    assert objective.better(low, None)


def test_values_and_objectives_survive_json():
    data = Data()
    objective = Objective("fpr", "gl_mcm", top_k=4, weight=0.2, pred_label=True)
    value = data.value(objective, [13])
    assert Value.from_dict(json.loads(json.dumps(value.as_dict(), allow_nan=False))) == value
    assert Objective(**json.loads(json.dumps(objective.describe()))) == objective


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "locoop_loss"}, "metric: expected one of 'loss', 'cross_entropy'"),
        ({"metric": "auroc"}, "score: expected one of 'mcm'"),
        ({"metric": "fpr", "score": "msp"}, "score: expected one of 'mcm'"),
        ({"score": "mcm"}, "score: expected None with metric='loss'"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.0}, "top_k: expected an integer"),
        ({"weight": -1.0}, "weight: expected a number >= 0"),
        ({"weight": math.nan}, "weight: expected a finite number"),
        ({"temperature": 0}, "temperature: expected a temperature > 0"),
        ({"pred_label": 1}, "pred_label: expected True or False"),
    ],
)
def test_settings_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**{"top_k": 2, **arguments})


@pytest.mark.parametrize(
    ("labels", "batches", "message"),
    [
        (torch.tensor([0, 1, -1]), [3], "labels: expected values in 0..K-1, got -1"),
        (torch.tensor([0.0, 1.0]), [2], "labels: expected integers"),
        (torch.tensor([[0, 1]]), [2], r"labels: expected shape \(N,\)"),
        (torch.tensor([], dtype=torch.long), [], r"labels: expected shape \(N,\)"),
        (torch.tensor([0, 1, 2]), [2], "batches: expected sizes that sum to the 3 images"),
        (torch.tensor([0, 1, 2]), [3, 0], "batches: expected an integer|1 <= batches"),
    ],
)
def test_labels_and_batches_that_are_refused(labels, batches, message):
    with pytest.raises(ValueError, match=message):
        Objective(top_k=1).tally(labels, batches)


def test_top_k_and_classes():
    data = Data(k=6)
    with pytest.raises(ValueError, match=r"top_k: expected 1 <= top_k <= K - 1 = 5 .* got 6"):
        data.value(Objective(top_k=6), [13])
    with pytest.raises(ValueError, match="expected at least 2, got 1"):
        Objective(top_k=1).check_classes(1)
    data.value(Objective(top_k=5), [13])
    data.labels = data.labels.clone()
    data.labels[4] = 6
    with pytest.raises(ValueError, match=r"labels: expected values in 0..5 \(K = 6\), got 6"):
        data.value(Objective(top_k=2), [13])


def test_shapes_that_are_refused():
    data = Data(n=4, p=3, k=5, d=6)
    tally = Objective(top_k=2).tally(data.labels, [4])
    z, zl, w = data.logits, data.local, data.weight
    for arguments, message in [
        ((0, z, zl[:3], w), r"local: expected \(4, P, D\)"),
        ((0, z, zl[:, :0], w), "b, P >= 1"),
        ((0, z, zl, w[:4]), r"weight: expected \(5, 6\)"),
        ((0, z, zl, w[:, :5]), r"weight: expected \(5, 6\)"),
        ((0, z, zl, w, torch.zeros(4)), r"bias: expected \(5,\)"),
        ((1, z, zl, w), "start"),
        ((-1, z, zl, w), "start"),
        ((0, z.long(), zl, w), "logits: expected a floating-point tensor"),
    ]:
        with pytest.raises(ValueError, match=message):
            tally.add(*arguments)
    tally.add(0, z[:2], zl[:2], w)
    with pytest.raises(ValueError, match=r"start: images 1\.\.2 hold one added before"):
        tally.add(1, z[1:3], zl[1:3], w)
    with pytest.raises(ValueError, match="local: expected 3 patches an image as before, got 2"):
        tally.add(2, z[2:], zl[2:, :2], w)
    with pytest.raises(ValueError, match="logits: expected 5 classes as before, got 4"):
        tally.add(2, z[2:, :4], zl[2:], w[:4])
    with pytest.raises(ValueError, match="2 of 4 images have not been added, the first is 2"):
        tally.value()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logits", "local", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_that_are_not_finite_are_named(name, bad, dtype):
    data = Data(bias=True, dtype=dtype)
    getattr(data, name).view(-1)[7] = bad
    with pytest.raises(ValueError, match=f"{name}: values must be finite, found NaN or Inf in row"):
        data.value(Objective(top_k=2), [13])


def test_products_that_overflow_are_no_value():
    data = Data(dtype=torch.float32)
    data.local = data.local * 1e38
    with pytest.raises(ValueError, match=r"finite.*NaN or Inf"):
        data.value(Objective(top_k=2), [13])


def test_nothing_given_is_written_to_and_no_gradient_is_kept():
    data = Data(n=4, p=3, k=5, bias=True)
    parts = [data.logits, data.local, data.weight, data.bias]
    before = [x.clone() for x in parts]
    for x in parts:
        x.requires_grad_()
    tally = data.tally(Objective("auroc", "gl_mcm", top_k=2), [4])
    assert all(torch.equal(x.detach(), y) for x, y in zip(parts, before, strict=True))
    assert isinstance(tally.value().loss, float)


def test_local_features_may_be_a_view():
    data = Data(n=5, p=4)
    objective = Objective(top_k=3)
    want = data.value(objective, [5])
    wide = torch.cat([data.local, data.local], dim=1)
    data.local = wide[:, 4:]
    assert not data.local.is_contiguous()
    assert data.value(objective, [5]) == want


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("score", [None, *SCORES])
def test_on_a_gpu(score):
    data = Data(n=17, p=30, k=40, seed=2)
    objective = Objective("auroc" if score else "loss", score, top_k=12)
    want = data.value(objective, [9, 8])
    for name in ("weight", "local", "logits"):
        setattr(data, name, getattr(data, name).cuda())
    found = data.value(objective, [9, 8], chunk=5)
    assert found.loss == pytest.approx(want.loss, rel=F64["rtol"])
    assert found.objective == pytest.approx(want.objective, rel=F64["rtol"])
    assert (found.ood_patches, found.accuracy) == (want.ood_patches, want.accuracy)
