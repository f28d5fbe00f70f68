"""What was measured of a run: plain data, kept as JSON, and its tables. Figures are made from it alone."""

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

    untrained  the same of a model of the same configuration before any training; None: not measured
    """

    run: str
    step: int
    sequence_length: int
    seed: int
    texts: dict[str, Any]
    found: Specialisation
    untrained: Specialisation | None
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
            found, control = _specialisation(data.pop("found")), data.pop("untrained")
            return cls(**data, found=found, untrained=None if control is None else _specialisation(control))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no record of `sparse-moe experts` ({error}).") from None


def information_table(found: Specialisation, untrained: Specialisation | None = None) -> list[str]:
    """Layer by layer: information, that of the untrained model, entropies, and the two nulls."""
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
    controls = [None] * len(found.layers) if untrained is None else untrained.layers
    pairs = zip(found.layers, controls, strict=True)
    return list(table(columns, [_row(layer, control) for layer, control in pairs]))


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


def verdict(found: Specialisation, untrained: Specialisation | None = None) -> str:
    """In how many layers the information is above shuffled blocks, and above the untrained model's."""
    layers = found.layers
    above = sum(layer.by_block.found > layer.by_block.quantile_99 for layer in layers)
    largest = max(layer.by_block.p_value for layer in layers)
    least = 1 / (layers[0].by_block.permutations + 1)
    chance = (
        f"above the 99 % quantile of shuffled blocks in {above} of {len(layers)} MoE layers "
        f"(largest p {largest:.3g}, least possible {least:.3g})"
    )
    if untrained is None:
        return chance
    more = sum(
        one.mutual_information > control.mutual_information
        for one, control in zip(layers, untrained.layers, strict=True)
    )
    return f"{chance}; more than in the untrained model in {more} of {len(layers)}"


def _row(layer: LayerSpecialisation, control: LayerSpecialisation | None) -> tuple[str, ...]:
    block, token = layer.by_block, layer.by_token
    return (
        str(layer.layer),
        f"{layer.mutual_information:.4f}",
        "-" if control is None else f"{control.mutual_information:.4f}",
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
