"""Questions about several needles at once say what they ask, and count what is right."""

import re
from collections import Counter

import numpy as np
import pytest

from moe.probes.needle.haystack import build_haystack
from moe.probes.needle.needles import TEMPLATES, Fact
from moe.probes.needle.several import SeveralQuestion, Step, ask_several, build_multi_value

TEXT = np.frombuffer(b"".join(b"line %d: real text\n" % i for i in range(4000)), np.uint8)


def build(needles: int = 100):
    return build_haystack(TEXT, length=32_768, queries=1, seed=0, needles=needles)


def multi_value(*, keys: int = 5, values: int = 3, seed: int = 0, template: str = "key_value", needles=100):
    return build_multi_value(
        TEXT, length=32_768, keys=keys, values=values, seed=seed, template=template, needles=needles
    )


def test_each_step_asks_for_another_needle():
    haystack = build()
    questions = ask_several(haystack, keys=4, questions=10, seed=0)
    facts = {needle.fact.key: needle for needle in haystack.needles}
    steps = [step for question in questions for step in question.steps]
    assert len(questions) == 10 and len({step.key for step in steps}) == len(steps) == 40
    for step in steps:
        needle = facts[step.key]
        assert step.accepted == (needle.fact.value,)
        assert step.query.removeprefix(b"\n") == TEMPLATES[needle.template].ask(step.key)


def test_the_suffix_reads_as_queries_and_answers_line_by_line():
    (question,) = ask_several(build(), keys=4, questions=1, seed=0)
    suffix = b"".join(step.query + step.accepted[0] for step in question.steps)
    lines = suffix.split(b"\n")
    assert len(lines) == 4
    assert all(re.fullmatch(rb"\?[a-z]+=\d{6}|# what .*\? it is \d{6}", line) for line in lines)


def test_a_hundred_needles_can_be_asked_for_in_one_suffix():
    haystack = build(100)
    (question,) = ask_several(haystack, keys=100, questions=1, seed=0)
    assert {step.key for step in question.steps} == {needle.fact.key for needle in haystack.needles}
    assert question.count_correct([step.accepted[0] for step in question.steps]) == 100


def test_the_seed_chooses_the_needles():
    first, again, other = (ask_several(build(), keys=4, questions=2, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_only_right_answers_count():
    (question,) = ask_several(build(), keys=3, questions=1, seed=0)
    right = [step.accepted[0] for step in question.steps]
    assert question.count_correct(right) == 3
    assert question.count_correct([right[1], right[0], right[2]]) == 1  # the value of another key
    assert question.count_correct([b"", b"12345", right[2] + b"0"]) == 0


def test_two_keys_with_the_same_value_count_twice():
    steps = tuple(Step(key, b"?%b=" % key, (b"123456",)) for key in (b"abcd", b"efgh"))
    assert SeveralQuestion(steps).count_correct([b"123456", b"123456"]) == 2


@pytest.mark.parametrize("template", ["key_value", "sentence"])
def test_a_key_with_several_values_has_a_needle_for_each(template):
    haystack, questions = multi_value(template=template)
    raw = haystack.ids.tobytes()
    assert len(raw) == 32_768 and len(questions) == 5 and haystack.questions == ()
    for question in questions:
        (key,) = {step.key for step in question.steps}
        (accepted,) = {step.accepted for step in question.steps}
        assert len(question.steps) == len(set(accepted)) == 3
        lines = [TEMPLATES[template].write(Fact(key, value)) for value in accepted]
        assert all(raw.count(line) == 1 for line in lines)


def test_all_values_of_a_key_differ_even_where_they_are_drawn_alike():
    _, (question,) = multi_value(keys=1, values=900, needles=900, seed=3)
    assert len(set(question.steps[0].accepted)) == 900


def test_the_other_keys_have_one_value():
    haystack, _ = multi_value()
    counts = Counter(needle.fact.key for needle in haystack.needles)
    assert Counter(counts.values()) == {3: 5, 1: 85}


def test_all_values_count_in_any_order_and_each_once():
    _, (question, *_) = multi_value()
    a, b, c = question.steps[0].accepted
    assert question.count_correct([c, a, b]) == 3
    assert question.count_correct([a, a, a]) == 1
    assert question.count_correct([a, b, b"000000"]) == 2


def test_a_haystack_with_several_values_is_a_function_of_its_seed():
    (first, _), (again, _), (other, _) = multi_value(), multi_value(), multi_value(seed=1)
    assert np.array_equal(first.ids, again.ids) and not np.array_equal(first.ids, other.ids)


def test_questions_that_cannot_be_asked_are_refused():
    with pytest.raises(ValueError, match="need 104 needles, and the haystack has 100"):
        ask_several(build(), keys=4, questions=26, seed=0)
    with pytest.raises(ValueError, match="keys=0 and questions=1 must be at least 1"):
        ask_several(build(), keys=0, questions=1, seed=0)
    with pytest.raises(ValueError, match="keys=34 with values=3 each, and 100 needles"):
        multi_value(keys=34)
    with pytest.raises(ValueError, match="two values"):
        multi_value(values=1)
    with pytest.raises(ValueError, match=r"must be one of.*sentence"):
        multi_value(template="definition")
