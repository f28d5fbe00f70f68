"""Languages, documents and training batches: what a book says is what the translations follow."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from language_helpers import ENTRY, GRAMMAR, Known, code, parse

from moe.probes.language.config import LanguageConfig
from moe.probes.language.document import Piece, ask, book, entry, grammar_line, lay_out
from moe.probes.language.grammar import (
    ADJECTIVES,
    MOST_WORDS,
    NOUNS,
    ORDERS,
    VERBS,
    Language,
    Phrase,
    Sentence,
    Word,
    draw_items,
    draw_language,
    draw_sentences,
    is_shown,
)
from moe.probes.language.training import draw_filler, draw_shape, training_batch

DOGS, CAT = Phrase("dog", True, "big"), Phrase("cat", False, "", "O")
SEE = Sentence(DOGS, "see", CAT)
WORDS = {"dog": "DDD", "cat": "CCC", "see": "VVV", "big": "BBB", "s": "PPP"}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Languages


def test_a_word_ends_in_the_book_as_it_does_in_a_sentence():
    """Copying goes on past a word, and must not say whether the sentence ends there."""
    language = Language(WORDS, "SVO", True, True)
    pieces = book(rng(), language, has_grammar=True, entries=1.0)
    written = {(word, piece.text[at:]) for piece in pieces for word, at in piece.words.items()}
    assert written >= {(word, f"{foreign} ;".encode()) for word, foreign in WORDS.items()}
    answer = ask(language, SEE).answer
    assert all(part.foreign.encode() + b" " in answer for part in language.translate(SEE))


@pytest.mark.parametrize(
    ("order", "adjective_first", "plural_first", "expected"),
    [
        ("SVO", True, True, "SaBBB SpPPP SnDDD VvVVV OnCCC"),
        ("SOV", False, True, "SpPPP SnDDD SaBBB OnCCC VvVVV"),
        ("VOS", True, False, "VvVVV OnCCC SaBBB SnDDD SpPPP"),
        ("OSV", False, False, "OnCCC SnDDD SpPPP SaBBB VvVVV"),
    ],
)
def test_a_sentence_follows_the_rules_of_its_language(order, adjective_first, plural_first, expected):
    language = Language(WORDS, order, adjective_first, plural_first)
    assert ask(language, SEE).answer.decode() == expected + " ;"
    assert ask(language, SEE).query.decode() == "\n?Sbig Sdogs Vsee Ocat>"


def test_a_language_has_as_many_different_words_as_asked_and_a_plural():
    for words in (4, 11, 64):
        language = draw_language(rng(words), words, (3, 3))
        assert len(set(language.words.values())) == len(language.words) == words + 1
        assert {len(word) for word in language.words.values()} == {3}
        assert (len(language.verbs), len(language.adjectives)) == (max(1, round(words / 4)),) * 2
        assert len(language.nouns) == words - 2 * len(language.verbs)
    lengths = {len(word) for word in draw_language(rng(), 64, (2, 4)).words.values()}
    assert lengths == {2, 3, 4}


def test_languages_differ_in_all_that_is_random():
    languages = [draw_language(rng(seed), 11, (3, 3)) for seed in range(100)]
    assert {language.order for language in languages} == set(ORDERS)
    assert {(one.adjective_first, one.plural_first) for one in languages} == {
        (a, b) for a in (0, 1) for b in (0, 1)
    }
    assert len({language.words.get("dog") for language in languages}) > 10
    assert len({tuple(language.nouns) for language in languages}) > 90


def test_english_words_are_different_and_of_three_letters():
    words = (*NOUNS, *VERBS, *ADJECTIVES)
    assert len(set(words)) == len(words) == MOST_WORDS >= 60
    assert {len(word) for word in words} == {3}
    assert not {noun + "s" for noun in NOUNS} & set(words)


@pytest.mark.parametrize(
    ("words", "letters", "message"),
    [(3, (3, 3), "words=3"), (65, (3, 3), "words=65"), (11, (1, 3), "letters"), (11, (4, 3), "letters")],
)
def test_a_language_that_cannot_be_is_refused(words, letters, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        draw_language(rng(), words, letters)


def test_sentences_use_the_words_of_the_language_and_two_different_nouns():
    language = draw_language(rng(), 11, (3, 3))
    sentences = draw_sentences(rng(1), language, 2000)
    nouns = [(one.subject.noun, one.object.noun) for one in sentences]
    assert set(nouns) == {(a, b) for a in language.nouns for b in language.nouns if a != b}
    assert {one.verb for one in sentences} == set(language.verbs)
    phrases = [phrase for one in sentences for phrase in one.phrases]
    assert {phrase.adjective for phrase in phrases} == {"", *language.adjectives}
    assert 0.45 < np.mean([bool(phrase.adjective) for phrase in phrases]) < 0.55
    assert 0.35 < np.mean([phrase.is_plural for phrase in phrases]) < 0.45


def test_a_rule_is_shown_by_an_example_that_needs_it():
    plain = Sentence(CAT, "see", Phrase("dog", False, "", "O"))
    big, many = (Sentence(CAT, "see", Phrase("dog", *words, "O")) for words in ((False, "big"), (True, "")))
    assert not is_shown(plain, []) and is_shown(plain, [plain])
    assert not is_shown(big, [plain, many]) and is_shown(big, [plain, big])
    assert not is_shown(many, [plain, big]) and is_shown(many, [many])
    assert not is_shown(SEE, [big]) and not is_shown(SEE, [many]) and is_shown(SEE, [big, many])


# Documents


def test_a_book_says_all_that_a_translation_needs():
    for seed in range(20):
        language = draw_language(rng(seed), 11, (2, 4))
        text = b"".join(piece.text for piece in book(rng(seed), language, has_grammar=True, entries=1.0))
        order, adjective, plural, some = (part.decode() for part in GRAMMAR.findall(text)[0])
        words = {a.decode(): b.decode() for a, b in ENTRY.findall(text)}
        again = Language(Known(words | {"s": some}), order, adjective == "an", plural == "pn")
        for sentence in draw_sentences(rng(seed + 1), language, 5):
            assert again.translate(sentence) == language.translate(sentence)


def test_half_a_book_has_half_the_entries_and_no_book_none():
    language = draw_language(rng(), 64, (3, 3))
    half = book(rng(), language, has_grammar=False, entries=0.5)
    assert len(half) == len({piece.text for piece in half}) == 32
    assert not book(rng(), language, has_grammar=False, entries=0.0)
    assert book(rng(), language, has_grammar=True, entries=0.0) == [grammar_line(language)]
    assert half != book(rng(1), language, has_grammar=False, entries=0.5)


def test_a_question_is_read_as_what_it_asks():
    language = draw_language(rng(), 11, (3, 3))
    for sentence in draw_sentences(rng(1), language, 50):
        one = ask(language, sentence)
        assert parse(one.query.decode()[2:-1]) == sentence
        assert one.answer.decode() == " ".join(part.gloss + part.foreign for part in one.parts) + " ;"


def test_pieces_are_laid_out_in_order_with_all_of_the_filler_between_them():
    language = Language(WORDS, "SVO", True, True)
    pieces = [entry(language, "dog"), grammar_line(language), Piece(b"\n?..")]
    filler = np.arange(97, 123, dtype=np.uint8)
    laid = lay_out(rng(), pieces, filler)
    assert len(laid.text) == sum(len(piece.text) for piece in pieces) + 26
    for piece, start in zip(pieces, laid.starts, strict=True):
        assert laid.text[start : start + len(piece.text)] == piece.text
    assert all(a < b for a, b in pairwise(laid.starts))
    rest = laid.text
    for piece in pieces:
        rest = rest.replace(piece.text, b"")
    assert rest == filler.tobytes()
    for letter in ("S", "V", "O", "na", "aa", "pp", "np"):  # and its rule
        assert chr(laid.text[laid.words.pop(letter)]) == letter[0]
    for word, place in laid.words.items():
        assert laid.text[place : place + 3].decode() == WORDS[word]
    assert set(laid.words) == {"dog", "s"}


# Training batches

CONFIG = LanguageConfig(filler_share=0.5)


def batch(step: int = 0, config: LanguageConfig = CONFIG, **changes):
    options = {"budget": 2000, "seed": 0, "step": step, "steps": 10, **changes}
    return training_batch(code(), config, **options)


def told(text: bytes) -> bytes:
    """The bytes of all translations, but for letters and ends of words that stand nowhere before."""
    kept = b""
    for answer in re.finditer(rb"\n\?[SVOa-z ]+>([A-Za-z ]+;)", text):
        for part in re.finditer(rb"([SVO][nvap])?([A-Z]+ )|;", answer[1]):
            gloss, word = part[1] or b"", part[2] or b""
            before = text[: answer.start(1) + part.start()]
            is_known = not word or re.search(rb"(?<![A-Z])" + word, before)
            kept += part[0] if is_known else gloss
    return kept


@pytest.mark.parametrize(
    "shares",
    [{"dictionary_share": 0.0}, {"dictionary_share": 0.5}, {"dictionary_share": 1.0}, {"partial_share": 1.0}],
    ids=str,
)
def test_all_translations_and_nothing_else_are_predicted_but_for_unknown_words(shares):
    everything = 0
    for step in range(12):
        made = batch(step, LanguageConfig(filler_share=0.5, letters=(4, 6), **shares))
        assert torch.equal(made.ids.gather(1, made.places + 1), made.targets)
        for ids, targets, is_answer in zip(made.ids, made.targets, made.is_answer, strict=True):
            text = bytes(ids.tolist())
            assert bytes(targets[is_answer].tolist()) == told(text)
            everything += len(told(text)) == len(b"".join(re.findall(rb">([A-Za-z ]+;)", text)))
    assert (everything > 0) == (shares.get("dictionary_share") != 0)


def test_pointers_lead_to_the_byte_to_copy_in_the_book():
    found = 0
    for step in range(6):
        made = batch(step, LanguageConfig(letters=(2, 4), filler_share=0.5))
        pointed = made.pointers >= 0
        assert torch.equal(made.ids.gather(1, made.pointers.clamp(min=0))[pointed], made.targets[pointed])
        assert (made.pointers < made.places)[pointed].all() and not pointed[~made.is_answer].any()
        for ids, pointers in zip(made.ids, made.pointers, strict=True):
            text = bytes(ids.tolist())
            for place in set(pointers[pointers >= 0].tolist()):
                line = text[text.rindex(b"\n", 0, place) :].split(b";")[0]
                assert b">" not in line, "an example is not the book"
        found += int(pointed.sum())
    assert found > 100


def test_glosses_point_at_their_letters_in_the_grammar_line():
    """The role at the order; a at its rule, p at its own, n at that of a where there is one."""
    seen = Counter[str]()
    for step in range(12):
        made = batch(step, LanguageConfig(grammar_share=1.0, exercises=0.0, partial_share=0.0))
        for row in zip(made.ids, made.places, made.pointers, strict=True):
            ids, places, pointers = (x.tolist() for x in row)
            pointed = dict(zip(places, pointers, strict=True))
            text = bytes(ids)
            line = GRAMMAR.search(text)
            assert line is not None
            spans = {name: range(*line.span(i)) for i, name in ((1, "order"), (2, "a"), (3, "p"))}
            for answer in re.finditer(rb">((?:[SVO][nvap][A-Z]+ )+);", text):
                glosses = list(re.finditer(rb"([SVO][nvap])[A-Z]+ ", text[: answer.end()][answer.start(1) :]))
                kinds = {found[1] for found in glosses}
                for found in glosses:
                    place = answer.start(1) + found.start() - 1  # the byte before the gloss predicts it
                    role, kind = found[1].decode()
                    assert pointed[place] in spans["order"]
                    if kind == "v":
                        assert pointed[place + 1] == -1
                        continue
                    has_adjective = f"{role}a".encode() in kinds
                    rule = "a" if kind == "a" or (kind == "n" and has_adjective) else "p"
                    assert pointed[place + 1] in spans[rule] and ids[pointed[place + 1]] == ord(kind)
                    seen[kind + rule] += 1
    assert set(seen) == {"na", "aa", "np", "pp"} and min(seen.values()) > 50


def test_places_rise_and_lie_inside():
    for step in range(6):
        made = batch(step)
        assert (made.places.diff(dim=1) >= 0).all() and (made.places >= 0).all()
        assert (made.places < made.ids.shape[1]).all()


def test_a_batch_is_a_function_of_seed_and_step():
    assert torch.equal(batch(3).ids, batch(3).ids)
    assert batch(3).ids.shape != batch(4).ids.shape or not torch.equal(batch(3).ids, batch(4).ids)
    assert not torch.equal(batch(3).ids[:1, :100], batch(3, seed=1).ids[:1, :100])


def test_a_batch_has_about_as_many_bytes_as_asked_in_so_many_parts():
    for step in range(40):
        b, s = batch(step, multiple=2).ids.shape
        assert b % 2 == 0 and (b == 2 or 1000 < b * s < 2600)


def test_filler_grows_to_its_most():
    config = LanguageConfig(filler_share=1.0, ramp=0.5)
    early = [draw_shape(rng(seed), config, 0.0).filler for seed in range(300)]
    late = [draw_shape(rng(seed), config, 0.5).filler for seed in range(300)]
    assert max(early) <= config.first_filler and config.first_filler < max(late) <= config.most_filler
    assert not draw_shape(rng(), LanguageConfig(filler_share=0.0), 1.0).filler


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("size", [0, 1, 2, 300])
def test_noise_is_a_stretch_of_a_few_bytes_repeated(size, seed):
    text = np.arange(1000) % 7
    plain = draw_filler(rng(seed), text.astype(np.uint8), size, 0.0)
    assert len(plain) == size and (np.diff(plain.astype(int)) % 7 == 1).all()
    noisy = draw_filler(rng(seed), text.astype(np.uint8), size, 1.0).astype(int)
    assert len(noisy) == size
    torn = np.flatnonzero(np.diff(noisy) % 7 != 1)
    if len(torn):
        stretch = noisy[torn[0] + 1 : torn[-1] + 1]
        assert any((stretch[p:] == stretch[:-p]).all() for p in range(1, 9)) or len(stretch) < 9


def test_noise_has_every_byte():
    text = np.zeros(500, np.uint8)
    seen = {byte for seed in range(800) for byte in draw_filler(rng(seed), text, 300, 1.0).tolist()}
    assert len(seen) == 256


def test_exercises_are_words_and_phrases_and_become_fewer():
    def kinds(done: float, exercises: float) -> list[float]:
        shape = draw_shape(rng(), LanguageConfig(exercises=exercises, exercise_ramp=0.5), done)
        language = draw_language(rng(1), 11, (3, 3))
        sentences = draw_sentences(rng(2), language, 4000)
        items = draw_items(rng(3), sentences, words=shape.single, phrases=shape.phrases)
        return [
            float(np.mean([isinstance(item, kind) for item in items])) for kind in (Word, Phrase, Sentence)
        ]

    assert np.allclose(kinds(0.0, 0.1), [0.4, 0.4, 0.2], atol=0.04)
    assert np.allclose(kinds(0.25, 0.1), [0.25, 0.3, 0.45], atol=0.04)
    assert np.allclose(kinds(0.5, 0.1), [0.1, 0.2, 0.7], atol=0.04)
    assert np.allclose(kinds(0.9, 0.0), [0, 0, 1])


def test_an_exercise_is_translated_as_a_part_of_a_sentence_is():
    language = Language(WORDS, "SVO", True, False)
    asked = [ask(language, item) for item in (DOGS, CAT, Word("see"))]
    assert [one.answer for one in asked] == [b"SaBBB SnDDD SpPPP ;", b"OnCCC ;", b"VVV ;"]
    assert [one.query for one in asked] == [b"\n?Sbig Sdogs>", b"\n?Ocat>", b"\n?see>"]


def test_shares_of_documents_have_grammar_and_dictionary():
    config = LanguageConfig(grammar_share=0.5, dictionary_share=0.8, filler_share=0.0)
    texts = [bytes(ids.tolist()) for step in range(40) for ids in batch(step, config).ids]
    grammar = np.mean([bool(GRAMMAR.search(text)) for text in texts])
    words = np.mean([bool(ENTRY.search(text)) for text in texts])
    assert abs(grammar - 0.5) < 0.12 and abs(words - 0.8) < 0.1


@pytest.mark.parametrize("partial", [0.0, 0.5, 1.0])
def test_a_share_of_the_dictionaries_lacks_any_number_of_words(partial):
    config = LanguageConfig(dictionary_share=1.0, partial_share=partial, large_share=0.0, filler_share=0.0)
    texts = [bytes(ids.tolist()) for step in range(60) for ids in batch(step, config).ids]
    sizes = [len(set(ENTRY.findall(text))) for text in texts]
    assert abs(np.mean(np.array(sizes) < 11) - partial * 10.5 / 11) < 0.12  # of 11 words, half a word is one
    assert not partial or set(sizes) == set(range(12))
