"""A needle evaluation as text: a table with a line for each row, and verdicts of one line.

Recall and bound are cut off after one decimal place, never rounded up: 1999 of 2000 is 99.9 %.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from moe.doctor import table
from moe.probes.needle.record import Model, NeedleRecord, NeedleRow, Tally, ask_once, tally

ABSENT = "-"
ENVIRONMENT = ("device", "versions", "commit", "date")  # what is said of the machine, over the table
HEAD = (
    "run",
    "template",
    "length",
    "haystacks x needles",
    "n",
    "right",
    "recall %",
    ">= %",
    "worst fifth of the depth",
    "prefill s",
    "tokens/s",
    "ms a query",
    "memory (cache / peak)",
    "text",
)
_MEBI, _MEGA, _KIBI = 2**20, 10**6, 2**10


def needle_table(record: NeedleRecord) -> list[str]:
    """Lines of Markdown: machine and commit, the table, then how each model was asked.

    ">= %" is the one-sided 95 % bound of the recall. Tokens are bytes. Text that was repeated says so.
    """
    names = model_names(record.rows)
    lines = table(HEAD, [(names[row.model], *cells(row)) for row in record.rows])
    return [*headline(record.environment), *lines, "", *paths(record.rows, names)]


def verdict(*rows: NeedleRow) -> str:
    """One line, such as `64k sentence: 500/500 = 100.0 % (>= 99.4 %)`; it says so if text was repeated.

    Of several rows, of one template and length, the answers of all together.
    """
    found, row = tally(rows), rows[0]
    repeated = ", repeated text" if any(row.text["repeated"] for row in rows) else ""
    return (
        f"{format_length(row.length)} {row.template}{repeated}: {found.right}/{found.asked} = "
        f"{format_percent(found.recall)} % (>= {format_percent(found.lower_bound)} %)"
    )


def verdicts(record: NeedleRecord) -> list[str]:
    """One line for each model, template and length, over all their rows, in the order of the rows.

    Questions that were asked again, in another dtype for example, count once. Models are named where there
    are several.
    """
    names = model_names(record.rows)
    groups: dict[tuple[Any, ...], list[NeedleRow]] = defaultdict(list)
    for row in ask_once(record.rows):
        groups[row.model, row.template, row.length].append(row)
    return [
        (f"{names[model]}: " if len(names) > 1 else "") + verdict(*rows)
        for (model, *_), rows in groups.items()
    ]


def format_length(length: int) -> str:
    """16k, 64k and 1M (2^20) for powers of two, 10M for 10^7, else the number: no two lengths look alike."""
    if length >= 10 * _MEGA and length % _MEGA == 0:
        return f"{length // _MEGA}M"
    if length < 10 * _MEBI and length % _MEBI == 0:
        return f"{length // _MEBI}M"
    if length % _KIBI == 0:
        return f"{length // _KIBI}k"
    return f"{length:,}"


def format_percent(share: float) -> str:
    """A share in per cent, cut off after one decimal place; "-" for NaN."""
    if math.isnan(share):
        return ABSENT
    return f"{math.floor(share * 1000) / 10:.1f}"


def format_bytes(size: int) -> str:
    """Decimal MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def format_count(count: int) -> str:
    """A number of parameters in three digits: 261k, 1.4M, 7.2B."""
    for size, letter in ((1, ""), (10**3, "k"), (10**6, "M")):
        if float(digits := f"{count / size:.3g}") < 1000:
            return digits + letter
    return f"{count / 1e9:.3g}B"


def model_names(rows: Iterable[NeedleRow]) -> dict[Model, str]:
    """A name for each model: its run, its variant, and its step where the run is there at several."""
    models = list(dict.fromkeys(row.model for row in rows))
    plain = {model: ", ".join(filter(None, (model.run, model.variant))) for model in models}
    seen = Counter(plain.values())
    return {model: name if seen[name] == 1 else f"{name}, step {model.step}" for model, name in plain.items()}


def cells(row: NeedleRow) -> tuple[str, ...]:
    """A row under HEAD, from the template on."""
    rate = f"{row.length / row.prefill_seconds:,.0f}" if row.prefill_seconds else ABSENT
    peak = format_bytes(row.peak_bytes) if row.peak_bytes else ABSENT
    return (
        row.template,
        format_length(row.length),
        f"{row.haystacks} x {row.needles}",
        str(row.asked),
        str(row.right),
        format_percent(row.recall),
        format_percent(row.lower_bound),
        _worst_quintile(row.quintiles),
        _digits(row.prefill_seconds),
        rate,
        _digits(1000 * row.answer_seconds / row.asked),
        f"{format_bytes(row.cache_bytes)} {row.dtype} / {peak}",
        "REPEATED text" if row.text["repeated"] else f"{row.text['files']} files",
    )


def _worst_quintile(quintiles: list[Tally]) -> str:
    """The fifth with the least recall; of equal ones, the one with the fewest questions."""
    asked = [i for i, part in enumerate(quintiles) if part.asked]
    worst = min(asked, key=lambda i: (quintiles[i].recall, quintiles[i].asked))
    part, width = quintiles[worst], 100 // len(quintiles)
    return f"{part.right}/{part.asked} at {worst * width}-{(worst + 1) * width} %"


def paths(rows: Iterable[NeedleRow], names: dict[Model, str]) -> list[str]:
    """A line for each model and way of asking it."""
    lengths: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        size = f"{format_count(row.total)} parameters, {format_count(row.active)} active"
        line = f"{names[row.model]}: {size}, step {row.step}; {row.path}; {row.dtype}"
        if format_length(row.length) not in lengths[line]:
            lengths[line].append(format_length(row.length))
    return [f"{line} ({', '.join(found)})" for line, found in lengths.items()]


def headline(environment: Mapping[str, Any]) -> list[str]:
    """A line about the machine, and an empty one; nothing where nothing is known."""
    facts = [f"{key}: {_flat(environment[key])}" for key in ENVIRONMENT if environment.get(key)]
    return ["; ".join(facts), ""] if facts else []


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {one}" for key, one in value.items() if one)
    return " and ".join(map(_flat, value)) if isinstance(value, list) else str(value)


def _digits(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"
