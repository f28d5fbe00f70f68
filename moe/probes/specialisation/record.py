"""What was measured of a run: plain data, kept as JSON, and its tables. Figures are made from it alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from moe.doctor import table
from moe.json_files import read_json
from moe.probes.specialisation.information import Null
from moe.probes.specialisation.measure import LayerSpecialisation, Specialisation
from moe.train.files import write_json


@dataclass(frozen=True, slots=True)
class SpecialisationRecord:
    """A run, its step, the texts of its labels (facts of each), what was found, and where.

    untrained  the same of models of the same configuration before any training, each from another seed
    """

    run: str
    step: int
    sequence_length: int
    seed: int
    texts: dict[str, Any]
    found: Specialisation
    untrained: tuple[Specialisation, ...]
    environment: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write as JSON, as a whole or not at all.

        Raises:
            OSError: as `moe.train.files.write_bytes`.
        """
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON, or not such a record.
        """
        data = read_json(path)
        try:
            found, untrained = data.pop("found"), data.pop("untrained")
            controls = tuple(map(_specialisation, untrained))
            return cls(**data, found=_specialisation(found), untrained=controls)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no record of `sparse-moe experts` ({error}).") from None


def information_table(found: Specialisation, untrained: Sequence[Specialisation] = ()) -> list[str]:
    """Layer by layer: information, that of the untrained models, entropies, and the two nulls."""
    columns = (
        "layer",
        "I(expert; label)",
        "untrained",
        "explained by ids",
        "H(label)",
        "H(expert)",
        "I / H(label)",
        "I of blocks",
        "null mean",
        "null 99 %",
        "p",
        "token null 99 %",
    )
    rows = [_row(layer, untrained_range(untrained, i)) for i, layer in enumerate(found.layers)]
    return list(table(columns, rows))


def untrained_range(untrained: Sequence[Specialisation], index: int) -> str:
    """Least and most information of the untrained models in the MoE layer of this index, counted from 0."""
    values = [control.layers[index].mutual_information for control in untrained]
    if not values:
        return "-"
    return f"{min(values):.4f}" if len(values) == 1 else f"{min(values):.4f} to {max(values):.4f}"


def shares_table(found: Specialisation) -> list[str]:
    """The share of the slots of each label at each expert, in percent, for every layer."""
    experts = len(found.layers[0].load)
    rows = [
        (str(layer.layer), label, *("-" if shares is None else [f"{100 * x:.1f}" for x in shares]))
        for layer in found.layers
        for label, shares in [*zip(found.labels, layer.shares, strict=True), ("all", layer.load)]
    ]
    filled = [(*row, *["-"] * (2 + experts - len(row))) for row in rows]
    return list(table(("layer", "label", *map(str, range(experts))), filled))


def verdict(found: Specialisation, untrained: Sequence[Specialisation] = ()) -> str:
    """In how many layers the information is above shuffled blocks, and above the untrained models'."""
    layers = found.layers
    above = sum(layer.by_block.found > layer.by_block.quantile_99 for layer in layers)
    largest = max(layer.by_block.p_value for layer in layers)
    least = 1 / (layers[0].by_block.permutations + 1)
    chance = (
        f"above the 99 % quantile of shuffled blocks in {above} of {len(layers)} MoE layers "
        f"(largest p {largest:.3g}, least possible {least:.3g})"
    )
    if not untrained:
        return chance
    more = sum(
        layer.mutual_information > max(control.layers[i].mutual_information for control in untrained)
        for i, layer in enumerate(layers)
    )
    return f"{chance}; more than in any of {len(untrained)} untrained models in {more} of {len(layers)}"


def _row(layer: LayerSpecialisation, untrained: str) -> tuple[str, ...]:
    block, token = layer.by_block, layer.by_token
    return (
        str(layer.layer),
        f"{layer.mutual_information:.4f}",
        untrained,
        "-" if layer.by_ids is None else f"{layer.by_ids:.4f}",
        f"{layer.label_entropy:.3f}",
        f"{layer.expert_entropy:.3f}",
        "-" if layer.normalised is None else f"{100 * layer.normalised:.2f} %",
        f"{block.found:.4f}",
        f"{block.mean:.4f}",
        f"{block.quantile_99:.4f}",
        f"{block.p_value:.3g}",
        "-" if token is None else f"{token.quantile_99:.6f}",
    )


def _specialisation(data: dict[str, Any]) -> Specialisation:
    layers = tuple(_layer(one) for one in data.pop("layers"))
    counts = {name: tuple(data.pop(name)) for name in ("labels", "tokens", "blocks")}
    return Specialisation(**counts, layers=layers, **data)


def _layer(data: dict[str, Any]) -> LayerSpecialisation:
    by_block, by_token = Null(**data.pop("by_block")), data.pop("by_token")
    shares = tuple(None if row is None else tuple(row) for row in data.pop("shares"))
    load = tuple(data.pop("load"))
    return LayerSpecialisation(
        **data,
        shares=shares,
        load=load,
        by_block=by_block,
        by_token=None if by_token is None else Null(**by_token),
    )
