"""The pipeline a command asks for, in the order that finds mistakes before long work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from fastood.cli import inputs, show

if TYPE_CHECKING:
    from fastood.data.imageset import ImageSet
    from fastood.features.featureset import FeatureSet
    from fastood.pipeline import Pipeline

__all__ = ["Request"]

_WEIGHTS = ("pretrained", "checkpoint", "device", "dtype", "allow_pickle")
_ENCODING = ("batch_size", "workers", "strict", "verify")


@dataclass
class Request:
    """The model side of a command, as typed."""

    model: str
    scores: Mapping[str, tuple[str, dict[str, Any]]] | None
    class_names: Sequence[str] | None = None
    named: bool = False
    templates: Sequence[str] | None = None
    text_features: str | None = None
    adapt: Sequence[str] | None = None
    allow_duplicates: bool = False
    negatives: str | None = None
    groups: int = 100
    train: str | None = None
    weights: Mapping[str, Any] = field(default_factory=dict)
    cache: str | None = None
    no_cache: bool = False
    encoding: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False

    @classmethod
    def of(cls, typed: Mapping[str, Any], **decided: Any) -> Request:
        """From all parameters of a command by name; ``decided`` goes before what was typed."""
        given = {**typed, **decided}
        known = {f.name for f in fields(cls)} - {"weights", "encoding"}
        return cls(
            **{name: value for name, value in given.items() if name in known},
            weights={name: given[name] for name in _WEIGHTS},
            encoding={name: given[name] for name in _ENCODING},
        )

    @contextmanager
    def pipeline(self, sets: Sequence[ImageSet | FeatureSet]) -> Iterator[Pipeline]:
        """A pipeline whose progress shows while the block runs.

        ``sets`` are those about to be scored: they decide whether patch scores are affordable.
        """
        from fastood.features import FeatureCache
        from fastood.models import load_model
        from fastood.pipeline import Pipeline
        from fastood.pipeline.methods import check_methods
        from fastood.scores.fitted import FIT_OPTIONS
        from fastood.scores.registry import default_methods

        if self.scores is not None:
            # what needs the model is checked by the pipeline
            classes = None if self.class_names is None else len(self.class_names)
            check_methods(self.scores, trained=True, classes=classes)
            asked = {name for name, _ in self.scores.values()}
            fitted = sorted(asked & set(FIT_OPTIONS))
            if fitted and self.train is None:
                raise ValueError(
                    f"--score {fitted[0]}: expected training images that it is fitted to, got "
                    "none; give --train PATH"
                )
            if "neg_label" in asked and self.negatives is None:
                raise ValueError(
                    "--score neg_label: expected negative labels, got none; give --negatives FILE"
                )
        cache = None if self.no_cache else FeatureCache(self.cache)
        negatives = None if self.negatives is None else inputs.read_lines(self.negatives)
        if negatives is not None and self.groups > len(negatives):
            raise ValueError(
                f"--groups: expected at most {len(negatives)}, the prompts in {self.negatives}, "
                f"got {self.groups}"
            )
        train = None if self.train is None else inputs.read_set(self.train)
        text, names = None, self.class_names
        own = inputs.adapted_classes(self.adapt)
        if own is not None and (names is None or (not self.named and inputs.within(names, own))):
            names = own
        if self.text_features is not None:
            features = inputs.read_features(self.text_features)
            text = features.image()
            if names is None and features.class_names is not None:
                names = features.class_names
        encoder = None
        if self.model != "none":
            encoder = load_model(self.model, **self.weights)
        if encoder is None and text is None:
            raise ValueError(
                "--model none: expected the features of the classes with it, got none; give "
                "--text-features FILE"
            )
        if encoder is not None and encoder.text is None and not self.named:
            names = (
                None  # a classifier has classes of its own; those of the folders need not be all
            )
        elif names is None and text is None and encoder is not None:
            raise ValueError(
                f"--classes: {encoder.name} scores the classes you name, and the images have no "
                "class subfolders to take them from; give --classes FILE"
            )
        methods: Any = self.scores
        if methods is None:
            local = inputs.affordable(encoder, sets)
            if not local and encoder is not None and encoder.no_local is None:
                show.note(
                    "patch scores are left out: the patch features of this many images take more "
                    "than 4 GB of cache; ask for them with --score gl_mcm"
                )
            classes = len(names) if names else 2 if text is None else len(text)
            methods = default_methods(local=local, classes=classes)
            methods += ["neg_label"] * (negatives is not None)
            methods += [*FIT_OPTIONS] * (train is not None)
        with show.progress(quiet=self.quiet) as bar:
            pipeline = Pipeline(
                encoder,
                names,
                templates=inputs.templates_of(self.templates),
                methods=methods,
                negatives=negatives,
                groups=self.groups,
                text=text,
                adapt=self.adapt or (),
                train=train,
                allow_duplicates=self.allow_duplicates,
                cache=cache,
                progress=bar,
                **self.encoding,
            )
            for message in pipeline.warnings:
                show.note(message)
            yield pipeline
