"""What a search found: which matrices lose how many singular directions.

A recipe is a small JSON file that says what it is, which model it belongs to and how it was found.
It is applied to a freshly loaded model; the weights themselves are not stored. ::

    {"format": "fastood-setar", "version": 1,
     "model": {"name": ..., "fingerprint": ..., "dtype": ..., "matrices": {"image.11.up": [8, 4]}},
     "picks": [{"tower": "image", "kind": "up", "layer": 11, "ratio": 0.15, "count": 1, ...}],
     "part": "minor", "seed": 0, "search": {...}}

Source: arXiv 2406.12629.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fastood._version import __version__
from fastood.atomic import write_text
from fastood.data.paths import refuse_folder
from fastood.errors import DataError
from fastood.models.copies import copy_encoder, network_of
from fastood.models.matrices import Matrix
from fastood.scores.inputs import check_count
from fastood.setar.factored import factor
from fastood.setar.lowrank import Part
from fastood.setar.matching import basis_of, describe, match
from fastood.setar.picks import Pick, as_pick

if TYPE_CHECKING:
    from typing_extensions import Self

    from fastood.models.base import Encoder

__all__ = ["FORMAT", "RECIPE", "VERSION", "Pick", "Recipe", "is_recipe"]

FORMAT, VERSION = "fastood-setar", 1
RECIPE = "recipe.json"
"""What a search calls its recipe."""

_PARTS: dict[str, Part] = {"small": "minor", "large": "principal", "random": "random"}
"""The authors' names."""


@dataclass(frozen=True)
class Recipe:
    """Picks, in the order of the search, and where they are from.

    Attributes:
        picks: also those of ratio 0.
        part: ``"minor"``, ``"principal"`` or ``"random"`` directions are dropped.
        seed: of random ones.
        model: name, fingerprint, dtype, ``matrices`` (address to [out, in] of each pick) and
            ``stages`` of a Swin; empty if no model was there (the authors' lists).
        search: settings, objective, partition, values, images; JSON values.
        fastood: version that wrote the file.
    Raises:
        ValueError: no picks, two of one matrix, an unknown part.
    """

    picks: tuple[Pick, ...]
    part: Part = "minor"
    seed: int = 0
    model: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    fastood: str = __version__

    def __post_init__(self) -> None:
        object.__setattr__(self, "picks", tuple(as_pick(pick) for pick in self.picks))
        if not self.picks:
            raise ValueError("picks: expected at least one, got none")
        addresses = [pick.address for pick in self.picks]
        twice = sorted({a for a in addresses if addresses.count(a) > 1})
        if twice:
            raise ValueError(
                f"picks: expected each matrix once, got {', '.join(twice)} more than once"
            )
        if self.part not in get_args(Part):
            raise ValueError(
                f"part: expected one of {', '.join(get_args(Part))}, got {self.part!r}"
            )
        check_count("seed", self.seed, 0, 2**63 - 1)

    # -- making ----------------------------------------------------------------------------

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        picks: Sequence[Any],
        *,
        part: Part = "minor",
        seed: int = 0,
        search: Mapping[str, Any] | None = None,
    ) -> Self:
        """A recipe of this model: picks are counted, and the model is noted.

        Raises:
            ModelError: matrices it does not have.
            ValueError: as the class; numbers above those of a matrix.
        """
        found = cls(tuple(picks), part, seed).matched(encoder)
        return cls(
            tuple(pick for pick, _ in found),
            part,
            seed,
            describe(encoder, [matrix for _, matrix in found]),
            dict(search or {}),
        )

    @classmethod
    def from_lora_settings(cls, given: Any) -> Self:
        """The authors' picks: ``[["visual", "W_up", 11, 0.15], ...]``, or a JSON file of theirs.

        A file holds the list, or is a configuration (``config_best.json``, SeTAR+FT's) with
        ``lora_settings`` and perhaps ``lora_svd_init_type``. Where a matrix comes up again, as
        projections do in their interleaved search, the last one counts, as in their code.

        Raises:
            ValueError: a list that is none of theirs.
            DataError: the same in a file; a file that cannot be read.
        """
        if isinstance(given, (str, os.PathLike)):
            return cls._from_content(_load(given), os.fspath(given))
        if not isinstance(given, Sequence):
            raise ValueError(
                f"lora_settings: expected a list of [tower, weight, layer, ratio], got "
                f"{type(given).__name__}"
            )
        last = {(pick := as_pick(one)).address: pick for one in given}
        return cls(tuple(last.values()))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """A recipe written by ``write``, or a file of the authors'.

        Raises:
            DataError: a file that is missing, damaged, of another format or a newer version.
        """
        return cls._from_content(_load(path), os.fspath(path))

    @classmethod
    def _from_content(cls, content: Any, path: str) -> Self:
        try:
            if isinstance(content, Mapping) and content.get("format") == FORMAT:
                return cls._from_ours(content)
            if isinstance(content, list):
                return cls.from_lora_settings(content)
            if isinstance(content, Mapping) and isinstance(content.get("lora_settings"), list):
                found = cls.from_lora_settings(content["lora_settings"])
                part = content.get("lora_svd_init_type") or "small"
                if part not in _PARTS:
                    raise ValueError(
                        f"lora_svd_init_type: expected one of {', '.join(_PARTS)}, got {part!r}"
                    )
                if part == "random":
                    warnings.warn(
                        f"{path}: the authors' random directions are those of their generator's "
                        "state and cannot be found again; others are drawn",
                        RuntimeWarning,
                        stacklevel=4,
                    )
                return cls(found.picks, _PARTS[part])
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: {error}") from error
        named = content.get("format") if isinstance(content, Mapping) else None
        raise DataError(
            f"{path}: expected a recipe of fastood (format {FORMAT!r}), or a list or configuration "
            f"with the authors' lora_settings, got JSON of format {named!r}"
        )

    @classmethod
    def _from_ours(cls, content: Mapping[str, Any]) -> Self:
        version = content.get("version")
        if version != VERSION or isinstance(version, bool):
            raise ValueError(
                f"written in version {version!r} of the format by fastood "
                f"{content.get('fastood')}; this is fastood {__version__}, which reads version "
                f"{VERSION}; update it"
            )
        picks = content.get("picks")
        if not isinstance(picks, list) or not all(isinstance(p, Mapping) for p in picks):
            raise ValueError("picks: expected a list of picks; the file is damaged")
        for name in ("model", "search"):
            if not isinstance(content.get(name, {}), Mapping):
                raise ValueError(f"{name}: expected fields and values; the file is damaged")
        model = content.get("model", {})
        shapes, stages = model.get("matrices", {}), model.get("stages", [])
        if (
            not isinstance(shapes, Mapping)
            or not all(_whole_numbers(shape, 2) for shape in shapes.values())
            or not _whole_numbers(stages)
        ):
            raise ValueError(
                "model: expected matrices as {address: [out, in]} and stages as a list of numbers; "
                "the file is damaged"
            )
        return cls(
            tuple(as_pick(pick) for pick in picks),
            content.get("part", "minor"),
            content.get("seed", 0),
            content.get("model", {}),
            content.get("search", {}),
            str(content.get("fastood", "")),
        )

    # -- telling ---------------------------------------------------------------------------

    @property
    def changes(self) -> tuple[Pick, ...]:
        """The picks that change something."""
        return tuple(pick for pick in self.picks if pick.ratio and pick.count != 0)

    @property
    def objective(self) -> float | None:
        """Of the search behind its last pick."""
        return self.picks[-1].objective

    @property
    def digest(self) -> str:
        """Hex digest of what is dropped, of whichever model."""
        seed = self.seed if self.part == "random" else 0  # of nothing else
        text = json.dumps([[p.lora_setting() for p in self.changes], self.part, seed])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def lora_settings(self) -> list[list[Any]]:
        """As the authors write it; blocks of a Swin as [stage, block].

        The list does not say which part is dropped, so read again it means the minor one.
        """
        return [pick.lora_setting(self.model.get("stages")) for pick in self.picks]

    def lora_config(self) -> dict[str, Any]:
        """Of the authors' configurations what a recipe says; ``read`` takes a file of it."""
        part = next(theirs for theirs, ours in _PARTS.items() if ours == self.part)
        return {"lora_svd_init_type": part, "lora_settings": self.lora_settings()}

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the JSON file, which appears whole or not at all.

        Raises:
            ValueError: a search or model that JSON cannot hold.
            DataError: if no file can be written there.
        """
        content = {
            "format": FORMAT,
            "version": VERSION,
            "fastood": self.fastood,
            "model": dict(self.model),
            "picks": [asdict(pick) for pick in self.picks],
            "part": self.part,
            "seed": self.seed,
            "search": dict(self.search),
        }
        try:
            text = json.dumps(content, allow_nan=False, ensure_ascii=False, indent=1)
        except (TypeError, ValueError) as error:
            raise ValueError(f"search, model: expected JSON values ({error})") from error
        return write_text(path, text + "\n")

    # -- applying --------------------------------------------------------------------------

    def matched(self, encoder: Encoder) -> list[tuple[Pick, Matrix]]:
        """The matrix of each pick in ``encoder``, and the pick with its number of directions.

        Raises:
            ModelError: matrices the model does not have, or of other shapes than the recipe's.
            ValueError: numbers of directions above those of a matrix; two picks of one.
        """
        return match(encoder, self.picks, self.model)

    def apply(self, encoder: Encoder, *, factored: bool = False) -> Encoder:
        """A copy of ``encoder`` whose picked matrices lost their directions.

        Its fingerprint is another, so that texts are encoded again and caches do not mix.

        Args:
            factored: in the image tower, two thin layers take the place of one where that is less
                work (for ViT-B/16's MLPs above a ratio of 0.2), see ``fastood.setar.factored``.
                The same numbers to rounding; nothing further can be trained or dropped there.
        Raises:
            ModelError: another architecture, with both sides printed; weights that are not
                finite; a model whose weights fastood does not change.
            ValueError: numbers of directions above those of a matrix.
        Warns:
            RuntimeWarning: the same architecture with other weights than the recipe was found on.
        """
        found = self.matched(encoder)
        self.warn_of_other_weights(encoder)
        changed = copy_encoder(encoder, name=f"{encoder.name} + setar")
        network = network_of(changed)
        for pick, matrix in found:
            if pick.count:
                weight = matrix.of(matrix.stored(network)).detach()
                basis = basis_of(weight, matrix, encoder.name)
                if factored and factor(network, matrix, basis, pick.count, self.part):
                    continue
                new = basis.drop(pick.count, part=self.part, seed=self.seed)
                matrix.write(network, new)
        return changed

    def warn_of_other_weights(self, encoder: Encoder) -> None:
        """Say so if the recipe was found on another model than ``encoder``."""
        theirs = self.model.get("fingerprint")
        if theirs is None or theirs == encoder.fingerprint:
            return
        dtype = str(encoder.dtype).removeprefix("torch.")
        warnings.warn(
            f"the recipe was found on {self.model.get('name')} (fingerprint {str(theirs)[:12]}, "
            f"{self.model.get('dtype')}), and is applied to {encoder.name} (fingerprint "
            f"{encoder.fingerprint[:12]}, {dtype}): the same architecture with other weights"
            f"{', or in another precision' if dtype != self.model.get('dtype') else ''}",
            RuntimeWarning,
            stacklevel=3,
        )


def _whole_numbers(given: Any, length: int | None = None) -> bool:
    """Whether it is a list of integers above 0, as JSON has them."""
    return (
        isinstance(given, list)
        and length in (None, len(given))
        and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given)
    )


def is_recipe(path: str | os.PathLike[str]) -> bool:
    """Whether a file is JSON text, rather than safetensors; False if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(64)
    except OSError:
        return False
    if 0 in head[:8]:  # safetensors begin with a length of eight bytes
        return False
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    return start in (b"{", b"[") or Path(path).suffix.lower() == ".json"


def _load(path: str | os.PathLike[str]) -> Any:
    refuse_folder(path, "a recipe", [RECIPE])
    shown = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"{shown}: expected a recipe, found no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown}: expected a recipe (JSON), cannot read it ({error})") from error
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{shown}: expected a recipe, but it is damaged, cut short or no JSON ({error})"
        ) from error


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")
