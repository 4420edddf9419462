"""The searches that ``parity.py`` compares. Standard library only."""

from __future__ import annotations

from typing import Any

RATIOS = (0, 0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.35, 0.40)


def clip(
    name: str,
    seed: int,
    *,
    layers: tuple[int, int] = (6, 4),
    width: int = 64,
    text_width: int = 48,
    projection: int = 32,
    image: int = 32,
    patch: int = 8,
    heads: int = 4,
    act: str = "quick_gelu",
    **settings: Any,
) -> dict[str, Any]:
    """One search on a random CLIP; ``layers`` of the image and the text tower."""
    vision = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers[0],
        "num_attention_heads": heads,
        "image_size": image,
        "patch_size": patch,
        "hidden_act": act,
    }
    text = {
        "hidden_size": text_width,
        "intermediate_size": 4 * text_width,
        "num_hidden_layers": layers[1],
        "num_attention_heads": heads,
        "max_position_embeddings": 40,
        "hidden_act": act,
    }
    own = {"model_type": "CLIP", "vision": vision, "text": text, "projection": projection}
    return {**_job(name, seed), **own, **settings}


def swin(name: str, seed: int, **settings: Any) -> dict[str, Any]:
    """One search on a random SwinV2 classifier of 14 classes."""
    vision = {
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2, 2],
        "num_heads": [2, 4, 4],
        "window_size": 4,
        "drop_path_rate": 0.0,
    }
    own = {"model_type": "SwinTransformerV2", "vision": vision, "searcher": "visual_only_swin"}
    return {**_job(name, seed), **own, "gamma": 3.0, "temperature": 1, **settings}


def _job(name: str, seed: int) -> dict[str, Any]:
    return {
        "name": name,
        "seed": seed,
        "dtype": "float64",
        "id_dataset": "ID_VOC",
        "shown": 14,
        "per_class": 3,
        "batch_size": 16,
        "gamma": 30.0,
        "gain": 0.8,
        "rate": 3.0,
        "searcher": "visual_text",
        "weight_type": "W_up",
        "freeze_proj": True,
        "ratios": RATIOS,
        "scorers": ["loss"],
        "best_scorer": "loss",
        "best_metric": "locoop_loss",
        "temperature": 100,
        "weight": 0.1,
        "top_k": 4,
        "pred_label": False,
        "prune": "small",
        "weights_only": False,
        "ft_steps": 0,
        "ft_batch": 28,
        "ft_rank": 0,
        "ft_lr": 0.002,
        "ft_decay": 0.0,
    }


def jobs() -> list[dict[str, Any]]:
    """Main comparison first: two orders, three types of weights, projections frozen and not."""
    both = {"freeze_proj": False}
    down, q = {"weight_type": "W_down"}, {"weight_type": "W_q"}
    turned = {"searcher": "text_visual"}
    main = [
        clip("up", 1, layers=(6, 4)),
        clip("up-turned", 2, layers=(4, 3), batch_size=10, **turned),
        clip("up-proj", 3, layers=(8, 6), width=48, heads=3, projection=24, top_k=3, **both),
        clip("up-turned-proj", 4, layers=(5, 5), batch_size=30, per_class=4, **turned, **both),
        clip("down", 5, layers=(5, 4), width=96, act="gelu", weight=0.5, **down),
        clip("down-turned-proj", 6, layers=(6, 3), batch_size=13, **turned, **down, **both),
        clip("q-proj", 7, layers=(7, 4), act="gelu", gain=1.2, weight=0.05, **q, **both),
        clip("q-turned", 8, layers=(4, 6), text_width=64, gain=1.2, top_k=5, **turned, **q),
    ]
    single = [{**job, "name": f"{job['name']}-f32", "dtype": "float32"} for job in main]
    woven = {"searcher": "modality_interleaved"}
    auroc = {"scorers": ["mcm_score"], "best_scorer": "mcm_score", "best_metric": "auroc"}
    fpr = {"scorers": ["gl_mcm_score"], "best_scorer": "gl_mcm_score", "best_metric": "fpr"}
    aupr = {"scorers": ["energy_score"], "best_scorer": "energy_score", "best_metric": "aupr"}
    energy = {**aupr, "best_metric": "auroc"}
    variance = {"scorers": ["var_score"], "best_scorer": "var_score", "best_metric": "auroc"}
    entropy = {"scorers": ["entropy_score"], "best_scorer": "entropy_score", "best_metric": "auroc"}
    local = {"scorers": ["l_mcm_score"], "best_scorer": "l_mcm_score", "best_metric": "auroc"}
    few = {"layers": (4, 2), "per_class": 2}
    more = [
        clip("woven", 11, layers=(5, 5), **woven),
        clip("woven-proj", 12, layers=(3, 3), weights_only=True, **woven, **both),
        clip("exhaustive", 13, layers=(3, 2), searcher="layer_exhaustive", per_class=2),
        clip("exhaustive-proj", 14, layers=(2, 2), searcher="layer_exhaustive", **both),
        clip("v-proj", 15, layers=(5, 3), weight_type="W_v", **both),
        clip("o", 16, layers=(5, 3), weight_type="W_o"),
        clip("k-turned", 17, layers=(5, 3), gain=1.2, weight_type="W_k", **turned),
        clip("image-only", 18, layers=(5, 3), searcher="visual_only", **both),
        clip("text-only", 19, layers=(4, 4), searcher="text_only", **both),
        clip("principal", 20, layers=(4, 2), prune="large"),
        clip("predicted", 21, layers=(4, 3), pred_label=True),
        clip("cross-entropy", 22, **few, best_metric="loss_id"),
        clip("patches", 23, **few, best_metric="loss_ood"),
        clip("q-patches", 33, **few, **q, best_metric="loss_ood"),
        clip("q-auroc-l-mcm", 34, **few, **q, **local),
        clip("auroc-mcm", 24, **few, **auroc),
        clip("fpr-gl-mcm", 25, **few, **fpr),
        clip("aupr-energy", 26, **few, **aupr),
        clip("auroc-variance", 27, **few, **variance),
        clip("auroc-entropy", 28, **few, **entropy),
        clip("auroc-l-mcm", 29, **few, **local),
        clip("coco", 30, layers=(6, 4), id_dataset="ID_COCO", shown=40, per_class=1, top_k=24),
        clip(
            "imagenet",
            31,
            layers=(4, 2),
            id_dataset="ID_ImageNet1K",
            shown=40,
            per_class=1,
            top_k=300,
        ),
        clip("no-ood-patches", 32, layers=(4, 2), top_k=13, batch_size=1, per_class=1),
        swin("swin", 41),
        swin("swin-f32", 41, dtype="float32"),
        swin("swin-down", 42, weight_type="W_down"),
        swin("swin-q", 43, weight_type="W_q"),
        swin("swin-v", 44, weight_type="W_v", **energy),
    ]
    tuned = {"ft_steps": 5, "per_class": 2}
    fine = [
        clip("ft", 51, layers=(4, 3), **tuned),
        clip("ft-proj", 52, layers=(4, 3), ft_lr=0.02, ft_decay=0.01, **tuned, **both),
        clip("ft-f32", 51, layers=(4, 3), dtype="float32", **tuned),
        swin("ft-swin", 45, ft_lr=0.05, ft_decay=5e-4, **tuned),
        clip("lora", 53, layers=(4, 3), ft_lr=0.01, ft_decay=5e-4, ft_rank=4, **tuned),
    ]
    return [*main, *single, *more, *fine]
