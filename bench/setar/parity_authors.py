"""Runs the authors' SeTAR code, unedited, on small random models. Part of ``parity.py``.

Lives in their environment (torch, transformers 4.37, their ``svd_ood`` and ``peft``), so it imports
nothing of fastood. What is set from outside, without touching their files:

- float64: ``torch.set_default_dtype``, for models saved in float64 and for their ``ToTensor``;
  loaded models are cast, for the one buffer of Swins that is float32 whatever the default;
- without a GPU ``Tensor.cuda`` returns the tensor: their loss calls it if no patch is OOD;
- their data loaders start no worker processes, which only saves time;
- ``test_classify``, which their repository lacks, and tensorboard are stand-ins in ``finetune``;
- fine-tuning sees the images without augmentation, in the order of the folders.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def setup(authors: Path, job: dict) -> None:
    """Their packages on the path; precision."""
    sys.path[:0] = [str(authors), str(authors / "src/svd_ood"), str(authors / "src/peft")]
    torch.set_num_threads(1)
    if job["dtype"] == "float64":
        torch.set_default_dtype(torch.float64)

    class Loader(torch.utils.data.DataLoader):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "num_workers": 0})

    torch.utils.data.DataLoader = Loader
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self: self
    from svd_ood.model_hub import ModelHub

    load = ModelHub.load

    def cast(self, *args, **kwargs):
        model, *rest = load(self, *args, **kwargs)
        return (model.to(getattr(torch, job["dtype"])), *rest)

    ModelHub.load = cast


# Models and images


def tokenizer_files(folder: Path, names: list[str], merges: int = 60) -> tuple[int, int]:
    """A byte-pair vocabulary of the prompts' words; ids of the two special tokens."""
    from collections import Counter

    from transformers.models.clip.tokenization_clip import bytes_to_unicode

    words: Counter = Counter()
    for name in names:
        for word in f"a photo of a {name}".lower().split():
            words[(*word[:-1], word[-1] + "</w>")] += 1
    found = []
    for _ in range(merges):
        pairs: Counter = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = max(sorted(pairs), key=lambda p: pairs[p])
        found.append(best)
        joined: Counter = Counter()
        for word, count in words.items():
            new, i = [], 0
            while i < len(word):
                if word[i : i + 2] == best:
                    new.append("".join(best))
                    i += 2
                else:
                    new.append(word[i])
                    i += 1
            joined[tuple(new)] += count
        words = joined
    letters = list(bytes_to_unicode().values())
    vocabulary = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in found), *SPECIAL]
    ids = {token: i for i, token in enumerate(vocabulary)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(m) for m in found)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return ids[SPECIAL[0]], ids[SPECIAL[1]]


def shape_weights(model: torch.nn.Module, seed: int, gain: float, rate: float) -> None:
    """Random weights of decaying spectrum, so that dropped directions matter little by little."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=g, dtype=torch.float64)
            if p.ndim == 2 and "embedding" not in name and "position" not in name:
                u, s, vh = torch.linalg.svd(draw, full_matrices=False)
                s = torch.exp(-rate * torch.arange(len(s), dtype=torch.float64) / len(s))
                s *= gain * math.sqrt(p.shape[0]) / s.norm()
                p.copy_(u * s @ vh)
            elif p.ndim >= 2:
                p.copy_(draw * (0.5 if p.ndim == 2 else 2.0 / math.sqrt(p[0].numel())))
            elif p.ndim == 1 and "weight" in name:
                p.copy_(1 + 0.1 * draw)
            elif p.ndim == 1:
                p.copy_(0.1 * draw)


def make_model(folder: Path, job: dict, names: list[str]) -> None:
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    if job["model_type"] == "CLIP":
        bos, eos = tokenizer_files(folder, names)
        config = transformers.CLIPConfig(
            projection_dim=job["projection"],
            text_config={
                **job["text"],
                "vocab_size": eos + 1,
                "bos_token_id": bos,
                "eos_token_id": eos,
                "pad_token_id": eos,
                "projection_dim": job["projection"],
            },
            vision_config={**job["vision"], "projection_dim": job["projection"]},
            logit_scale_init_value=math.log(job["gamma"]),
        )
        tokenizer = transformers.CLIPTokenizer(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            model_max_length=job["text"]["max_position_embeddings"],
        )
        tokenizer.save_pretrained(folder)
        model = transformers.CLIPModel(config)
    else:
        config = transformers.Swinv2Config(**job["vision"], num_labels=len(names))
        model = transformers.Swinv2ForImageClassification(config)
    shape_weights(model, job["seed"], job["gain"], job["rate"])
    with torch.no_grad():
        if job["model_type"] == "CLIP":
            model.logit_scale.fill_(math.log(job["gamma"]))
        else:
            model.classifier.weight.mul_(job["gamma"])
    model.save_pretrained(folder, safe_serialization=True)


def make_images(folder: Path, job: dict, names: list[str]) -> None:
    """Smooth random images with a tint of their class, already in the size of the model."""
    rng = np.random.default_rng(job["seed"])
    size = job["vision"]["image_size"]
    for name in names:
        tint = rng.normal(size=(4, 4, 3))
        for i in range(job["per_class"]):
            small = 0.7 * tint + rng.normal(size=(4, 4, 3))
            fine = 0.5 * rng.normal(size=(size, size, 3))
            big = np.kron(small, np.ones((size // 4, size // 4, 1))) + fine
            pixels = (255 / (1 + np.exp(-big))).astype(np.uint8)
            target = folder / name.replace("/", "-") / f"{i}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)


# Their search


def arguments(job: dict, folder: Path, data: Path) -> argparse.Namespace:
    return argparse.Namespace(
        data_root=str(data),
        id_dataset=job["id_dataset"],
        split="val",
        batch_size=job["batch_size"],
        seed=5,
        device="cpu",
        scorers=list(job["scorers"]),
        temperature=job["temperature"],
        exp_name=job["name"],
        log_directory=str(folder / "log"),
        recall_level=0.95,
        model_name=str(folder / "model"),
        model_type=job["model_type"],
        clip_ckpt=None,
        locoop_ckpt=None,
        n_ctx=16,
        lora_svd_init=True,
        lora_svd_init_type=job["prune"],
        lora_settings=None,
        target_modules=None,
        lora_r=None,
        searcher=job["searcher"],
        candi_ratios=list(job["ratios"]),
        weight_type=job["weight_type"],
        best_scorer=job["best_scorer"],
        best_metric=job["best_metric"],
        freeze_proj=job["freeze_proj"],
        locoop_lambda=job["weight"],
        locoop_top_k=job["top_k"],
        use_pred_label=job["pred_label"],
    )


def search(job: dict, folder: Path, data: Path) -> None:
    """Their ``Searcher.run``; every evaluation is written down as it is made."""
    from svd_ood.dataloaders import get_id_loader
    from svd_ood.model_hub import ModelHub
    from svd_ood.searchers import Searcher
    from svd_ood.utils.data_utils import get_id_labels

    args = arguments(job, folder, data)
    Path(args.log_directory).mkdir(parents=True, exist_ok=True)
    hub = ModelHub(args.model_type)
    model, _, val, tokenizer = hub.load(model_name=args.model_name, device="cpu")
    loader = get_id_loader(args.data_root, args.batch_size, args.id_dataset, "val", val)
    batches = list(loader)
    tensors = {
        "pixels": torch.cat([x for x, _ in batches]),
        "labels": torch.cat([y for _, y in batches]),
    }
    names = get_id_labels(args.id_dataset)
    if tokenizer is not None:
        prompts = [f"a photo of a {c}" for c in names]
        tokens = tokenizer(prompts, return_tensors="pt", padding=True, truncation=True)
        tensors["tokens"] = tokens.input_ids
    save_file(tensors, str(folder / "exchange.safetensors"))

    searcher = Searcher(
        searcher=args.searcher,
        candi_ratios=args.candi_ratios,
        layer_num=hub.get_layer_num(args.model_name),
        weight_type=args.weight_type,
        best_metric=args.best_metric,
        best_scorer=args.best_scorer,
        freeze_proj=args.freeze_proj,
    )
    evaluations: list = []
    compute = searcher.searcher.compute_metrics_loss

    def noted(args, verbose=False):
        found = compute(args, verbose)
        settings = [list(s) for s in args.lora_settings]
        evaluations.append({"setting": settings[-1], "before": settings[:-1], "metrics": found})
        return found

    searcher.searcher.compute_metrics_loss = noted
    start = time.perf_counter()
    picks = searcher.run(args)
    seconds = time.perf_counter() - start
    steps = list(searcher.searcher.get_best_results().values())

    args.lora_settings = picks
    pruned = hub.apply_svd_prune(model, args, verbose=False)
    state = {k: v.detach().contiguous().clone() for k, v in pruned.state_dict().items()}
    save_file(state, str(folder / "pruned.safetensors"))
    sizes = [len(y) for _, y in batches]
    result = {
        "job": job,
        "names": names,
        "batches": sizes,
        "picks": picks,
        "steps": steps,
        "evaluations": evaluations,
        "seconds": seconds,
        "versions": versions(),
    }
    (folder / "result.json").write_text(json.dumps(result, default=float, indent=1))


def versions() -> dict:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


# Their fine-tuning


def finetune(job: dict, folder: Path, data: Path, settings: list) -> None:
    """Their ``run_finetune`` for a few steps; losses as they log them, and the merged weights."""
    losses: list = []

    class Writer:
        def __init__(self, *args, **kwargs):
            pass

        def add_scalar(self, name, value, step):
            losses.append((step, name, float(value)))

    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer
    sys.modules["torch.utils.tensorboard"] = board
    for name, function in (
        ("test_classify", "run_test_classify"),
        ("test_ood", "run_test_ood"),
    ):
        stand_in = types.ModuleType(name)
        setattr(stand_in, function, None)
        sys.modules[name] = stand_in
    import finetune as theirs
    from svd_ood.model_hub import ModelHub

    load, loader = ModelHub.load, theirs.get_id_loader

    def plain(self, **kwargs):
        model, _, val, tokenizer = load(self, **kwargs)
        return model, val, val, tokenizer

    ModelHub.load = plain
    theirs.get_id_loader = lambda *a, shuffle: loader(*a, shuffle=False)
    args = arguments(job, folder, data)
    args.log_directory = str(folder / "log-ft")
    Path(args.log_directory).mkdir(parents=True, exist_ok=True)
    args.lora_settings = settings
    if job["ft_rank"]:  # their LoRA baseline, as in their configuration
        args.lora_settings, args.target_modules = None, ["mlp.fc1"]
        args.lora_svd_init, args.lora_r = False, job["ft_rank"]
        make = theirs.PeftModel

        def noted(*given, **options):
            model = make(*given, **options)
            start = {
                name.removeprefix("base_model.model."): module.lora_A["default"].weight.detach()
                for name, module in model.named_modules()
                if hasattr(module, "lora_A")
            }
            save_file({name: w.clone() for name, w in start.items()}, folder / "lora_A.safetensors")
            return model

        theirs.PeftModel = noted
    args.batch_size = job["ft_batch"]
    for name, value in {
        "num_train_epochs": 3,
        "max_train_steps": job["ft_steps"],
        "gradient_accumulation_steps": 1,
        "learning_rate": job["ft_lr"],
        "weight_decay": job["ft_decay"],
        "momentum": 0.9,
        "lr_scheduler_type": "cosine",
        "num_warmup_steps": 0,
        "logging_steps": 1,
        "lora_alpha": None,
    }.items():
        setattr(args, name, value)
    theirs.run_finetune(args, verbose=False)
    state = torch.load(Path(args.log_directory) / "finetuned_model.pth", weights_only=True)
    save_file(
        {k: v.detach().contiguous().clone() for k, v in state.items()},
        str(folder / "finetuned.safetensors"),
    )
    (folder / "finetune.json").write_text(json.dumps({"settings": settings, "losses": losses}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--authors", type=Path, required=True)
    parser.add_argument("--job", type=Path, required=True, help="JSON; results land beside it")
    parser.add_argument("--only", choices=["make", "search", "finetune"], default=None)
    given = parser.parse_args()
    job = json.loads(given.job.read_text())
    setup(given.authors, job)
    random.seed(0)
    from svd_ood.utils.data_utils import get_id_labels

    names = get_id_labels(job["id_dataset"])
    folder = given.job.parent.resolve()
    data = folder / "data"
    if given.only in (None, "make"):
        make_model(folder / "model", job, names)
        make_images(data / job["id_dataset"] / "val", job, names[: job["shown"]])
    if given.only in (None, "search"):
        search(job, folder, data)
    if given.only == "finetune" or (given.only is None and job["ft_steps"]):
        finetune(job, folder, data, json.loads((folder / "result.json").read_text())["picks"])


if __name__ == "__main__":
    main()
