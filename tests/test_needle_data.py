"""Facts, and training sequences in which every answer can be copied from its needle."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.probes.needle.config import NeedleConfig
from moe.probes.needle.needles import RANDOM_TEMPLATES, TEMPLATES, draw_needles
from moe.probes.needle.training import TrainingBatch, predicted_places, training_batch

# No needle can be mistaken for this text.
TEXT = np.frombuffer(b"".join(b"line %d: real text\n" % i for i in range(4000)), np.uint8)
PATTERNS = {
    "key_value": (rb"@([a-z]{4,8})=(\d{6});\n", rb"\?([a-z]{4,8})=(\d{6})\n"),
    "sentence": (
        rb"# the magic number of ([a-z]{4,8}) is (\d{6})\.\n",
        rb"# what is the magic number of ([a-z]{4,8})\? it is (\d{6})\n",
    ),
}
ONE_TEMPLATE = [("key_value",), ("sentence",)]


def draw(count: int, *, keys: float = 0.0, values: float = 0.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    return draw_needles(rng, count, near_duplicate_keys=keys, near_duplicate_values=values)


def make(config: NeedleConfig | None = None, *, length=1024, batch=2, seed=0, step=0, text=TEXT):
    return training_batch(text, config or NeedleConfig(), length=length, batch=batch, seed=seed, step=step)


def found(row: bytes, which: int) -> list[tuple[bytes, bytes, str, int, int]]:
    """Key, value, template, start and start of the value of all needles (which = 0) or queries (1)."""
    return [
        (match[1], match[2], name, match.start(), match.start(2))
        for name, patterns in PATTERNS.items()
        for match in re.finditer(patterns[which], row)
    ]


def rows_of(batch: TrainingBatch):
    """Bytes and the four vectors of each sequence."""
    for row in zip(batch.ids, batch.places, batch.targets, batch.is_answer, batch.pointers, strict=True):
        yield bytes(row[0].tolist()), *(part.tolist() for part in row[1:])


def difference(a: bytes, b: bytes) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True)) if len(a) == len(b) else -1


# Facts


@given(st.integers(0, 300), st.floats(0, 1), st.floats(0, 1), st.integers(0, 5))
def test_facts_have_different_keys_and_six_digits(count, keys, values, seed):
    facts = draw(count, keys=keys, values=values, seed=seed)
    assert len({fact.key for fact in facts}) == len(facts) == count
    for key, value in facts:
        assert re.fullmatch(rb"[a-z]{4,8}", key) and re.fullmatch(rb"\d{6}", value)


def test_near_duplicate_keys_are_an_earlier_key_with_one_letter_changed():
    keys = [fact.key for fact in draw(1000, keys=0.3)]
    near = sum(any(difference(key, other) == 1 for other in keys[:i]) for i, key in enumerate(keys))
    assert 0.25 < near / 1000 < 0.35


def test_without_near_duplicates_keys_are_far_apart():
    keys = [fact.key for fact in draw(300) if len(fact.key) > 5]
    assert not any(difference(a, b) == 1 for a in keys for b in keys)


def test_near_duplicate_values_are_one_of_the_last_twenty_with_one_digit_changed():
    values = [fact.value for fact in draw(2000, values=0.5)]
    near = [
        any(difference(value, other) == 1 for other in values[max(0, i - 20) : i])
        for i, value in enumerate(values)
    ]
    assert 0.46 < sum(near) / 2000 < 0.54


def test_all_near_duplicates_are_possible():
    facts = draw(200, keys=1.0, values=1.0)
    assert len({len(fact.key) for fact in facts}) == 1  # all descend from the first
    assert all(
        any(difference(b.value, a.value) == 1 for a in facts[max(0, i - 19) : i + 1])
        for i, b in enumerate(facts[1:])
    )


@pytest.mark.parametrize("name", RANDOM_TEMPLATES)
def test_a_template_asks_for_what_it_wrote(name):
    template, (fact,) = TEMPLATES[name], draw(1)
    needle, query = PATTERNS[name]
    written, asked = template.write(fact), template.ask(fact.key)
    assert re.fullmatch(needle, written) and re.fullmatch(query, asked + fact.value + template.close)
    start = template.value_start(fact.key)
    assert written[start : start + 6] == fact.value
    assert written[start - 1] == asked[-1]  # what attention to "the byte after this one" relies on


# Training sequences


@pytest.mark.parametrize("templates", [*ONE_TEMPLATE, ("key_value", "sentence")])
@pytest.mark.parametrize("length", [256, 1024])
def test_every_answer_is_the_value_of_its_needle_and_points_at_it(templates, length):
    for step in range(10):
        batch = make(NeedleConfig(templates=templates), length=length, step=step)
        for row, places, _, is_answer, pointers in rows_of(batch):
            needles = {key: (value, name, end) for key, value, name, _, end in found(row, 0)}
            expected = {}
            for key, value, name, start, answer in found(row, 1):
                needle_value, needle_name, needle_start = needles[key]
                assert (value, name) == (needle_value, needle_name) and needle_start < start
                expected |= {answer + i - 1: needle_start + i for i in range(6)}
            answers = {place: p for place, p, is_it in zip(places, pointers, is_answer, strict=True) if is_it}
            # The last query may end with the row, where the pattern does not see its end of line.
            assert expected.items() <= answers.items() and len(answers) - len(expected) in (0, 6)
            assert all(
                row[pointer] == row[place + 1] for place, pointer in answers.items() if place < length - 1
            )
            assert all((pointer < 0) != is_it for pointer, is_it in zip(pointers, is_answer, strict=True))


def test_targets_are_the_next_bytes_and_places_ascend():
    batch = make(batch=4)
    for row, places, targets, _, _ in rows_of(batch):
        assert all(a < b for a, b in pairwise(places)) and places[0] >= 0 and places[-1] < len(row)
        inside = [
            (place, target) for place, target in zip(places, targets, strict=True) if place + 1 < len(row)
        ]
        assert all(row[place + 1] == target for place, target in inside) and len(inside) >= len(places) - 1


def test_all_answers_and_a_tenth_of_the_other_places_are_predicted():
    config = NeedleConfig(templates=("key_value",))
    others = 0
    for step in range(20):
        batch = make(config, length=3072, batch=1, step=step)
        (row, _, _, is_answer, _), *_ = rows_of(batch)
        assert sum(is_answer) == 6 * (row.count(b"?"))
        assert batch.places.shape[1] == predicted_places(config, 3072)
        others += len(is_answer) - sum(is_answer)
    assert 0.07 < others / 20 / 3072 < 0.12


def test_the_other_places_are_spread_over_the_sequence():
    batch = make(length=3072, batch=8)
    others = batch.places[~batch.is_answer].double()
    assert 0.45 < others.mean() / 3072 < 0.55 and 0.27 < others.std() / 3072 < 0.31  # uniform: 0.5 and 0.289


@given(st.floats(0.2, 0.95), st.floats(0, 1), st.integers(476, 700), st.integers(0, 3))
def test_every_row_has_an_answer_and_the_same_number_of_places(needle_share, text_share, length, step):
    config = NeedleConfig(needle_share=needle_share, text_share=text_share)
    batch = make(config, length=length, batch=3, step=step)
    m = predicted_places(config, length)
    assert batch.ids.shape == (3, length) and batch.ids.dtype == torch.int64
    for part in (batch.places, batch.targets, batch.is_answer, batch.pointers):
        assert part.shape == (3, m)
    answers = batch.is_answer.sum(1)
    assert (answers > 0).all() and answers.remainder(6).eq(0).all()  # whole queries


def test_three_quarters_of_the_bytes_are_needles_and_queries():
    for step in range(10):
        for row, *_ in rows_of(make(length=3072, step=step)):
            used = sum(
                len(match[0])
                for patterns in PATTERNS.values()
                for p in patterns
                for match in re.finditer(p, row)
            )
            assert 0.7 < used / 3072 <= 0.751


def test_half_of_the_sequences_mix_the_templates_and_the_others_share_the_rest():
    kinds = Counter()
    for row, *_ in rows_of(make(length=1024, batch=400)):
        names = {name for _, _, name, _, _ in found(row, 0)}
        kinds["mixed" if len(names) > 1 else names.pop()] += 1
    assert 0.43 < kinds["mixed"] / 400 < 0.57
    assert 0.18 < kinds["key_value"] / 400 < 0.32


def test_half_of_the_queries_stand_together_at_the_end():
    for row, *_ in rows_of(make(length=3072, batch=10)):
        last_needle = max(start for *_, start, _ in found(row, 0))
        last_text = max(match.end() for match in re.finditer(rb"real|text|line", row))
        queries = found(row, 1)
        at_the_end = sum(start >= max(last_text, last_needle) for *_, start, _ in queries)
        assert 0.45 < at_the_end / len(queries) < 0.65
        inside = [start / len(row) for *_, start, _ in queries if start < last_needle]
        assert min(inside) < 0.3  # and the others anywhere


def test_the_filler_is_consecutive_text():
    for row, *_ in rows_of(make(length=1024, batch=10)):
        rest = row
        for patterns in PATTERNS.values():
            for pattern in patterns:
                rest = re.sub(pattern, b"", rest)
        rest = re.split(rb"[?#]", rest)[0]  # the last query lacks its end of line
        assert len(rest) > 150 and rest in TEXT.tobytes()


def test_a_batch_is_a_function_of_seed_and_step():
    first, again = make(seed=3, step=7), make(seed=3, step=7)
    for name in TrainingBatch.__dataclass_fields__:
        assert torch.equal(getattr(first, name), getattr(again, name))
    others = [make(seed=3, step=8), make(seed=4, step=7), make(seed=7, step=3)]
    assert all(not torch.equal(first.ids, other.ids) for other in others)
    assert not torch.equal(first.ids[0], first.ids[1])


def test_answers_that_do_not_fit_are_dropped_as_whole_queries():
    config = NeedleConfig(templates=("sentence", "key_value"), needle_share=0.95, text_share=0)
    for step in range(30):
        batch = make(config, length=512, batch=1, step=step)
        assert 6 <= batch.is_answer.sum() <= predicted_places(config, 512)
        assert batch.is_answer.sum() % 6 == 0


# Settings


def test_the_first_steps_have_short_sequences_of_the_same_bytes():
    config = NeedleConfig()
    assert config.shape(0, 1000, length=3072, batch=1) == (512, 6)
    assert config.shape(49, 1000, length=3072, batch=1) == (512, 6)
    assert config.shape(50, 1000, length=3072, batch=1) == (3072, 1)
    assert config.shape(0, 1000, length=256, batch=4) == (256, 4)
    assert NeedleConfig(short_fraction=0).shape(0, 1000, length=3072, batch=1) == (3072, 1)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"templates": ()}, "at least one of"),
        ({"templates": ("sentense",)}, "Did you mean.*sentence"),
        ({"templates": ("sentence", "sentence")}, "Name each once"),
        ({"near_duplicate_keys": 1.5}, "needle.near_duplicate_keys=1.5 is a share"),
        ({"near_duplicate_values": -0.1}, "is a share"),
        ({"text_share": float("nan")}, "is a share"),
        ({"short_fraction": 2}, "is a share"),
        ({"needle_share": 0}, "between 0 and 1"),
        ({"needle_share": 1.0}, "between 0 and 1"),
        ({"text_loss": -1}, "weight of a loss"),
        ({"pointer_loss": float("inf")}, "weight of a loss"),
        ({"short_length": 126}, "short_length=126 must be at least 127"),
        ({"needle_share": 0.1}, "short_length=512 must be at least 950"),
    ],
)
def test_settings_out_of_range_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        NeedleConfig(**bad)


def test_sequences_that_are_too_short_or_longer_than_the_text_are_refused():
    with pytest.raises(ValueError, match="length=126 must be at least 127"):
        make(length=126)
    assert make(NeedleConfig(templates=("key_value",)), length=47).is_answer.any(1).all()
    with pytest.raises(ValueError, match="must be longer than a sequence of 1024"):
        make(text=TEXT[:1024])
