"""Settings of decoders for long context: patterns, refusals, files, other formats, and what they cost."""

import json
from dataclasses import replace

import pytest
import torch
from decoder_variants import BASE, LATENT, LONG, VARIANTS, drawn, tokens

from moe import Decoder, DecoderConfig, count_parameters, flops_per_token
from moe.cli import main
from moe.decoder_config import layer_pattern
from moe.hf.export import describe_as, essence
from moe.train.overrides import change, load_settings
from moe.train.settings import RunConfig

L, G = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("pattern", "types"),
    [
        ("LLG", (L, L, G)),
        ("G", (G,)),
        ("LLLGx2", (L, L, L, G) * 2),
        ("Gx3", (G,) * 3),
        ("LGx10", (L, G) * 10),
    ],
)
def test_a_pattern_is_its_letters_as_often_as_it_says(pattern, types):
    assert layer_pattern(pattern) == types
    window = 4 if "L" in pattern else None
    config = replace(BASE, num_hidden_layers=len(types), layer_types=pattern, sliding_window=window)
    assert config.layer_types == types
    assert [config.window(i) for i in range(len(types))] == [window if t == L else None for t in types]


@pytest.mark.parametrize(
    "pattern", ["", "x2", "LQ", "llg", "LLGx0", "LLGx", "LLGx-1", "LLGx2x2", "LLGx1.5", "LLG x2", "2xLLG"]
)
def test_other_words_are_no_patterns(pattern):
    with pytest.raises(ValueError, match=rf"layer_types='{pattern}' must be letters L .*such as \"LLGx?.*x2"):
        replace(BASE, layer_types=pattern, sliding_window=4)


@pytest.mark.parametrize("count", ["9" * 12, "9" * 5000], ids=["many", "more"])
def test_a_pattern_that_fits_no_memory_is_refused(count):
    with pytest.raises(ValueError, match="layer_types='LLGx9999"):
        replace(BASE, layer_types=f"LLGx{count}", sliding_window=4)


NONSENSE = {
    "another number of layers": (
        {"layer_types": "LLGx2", "sliding_window": 4},
        "one for each of the 3 layers",
    ),
    "fewer types than layers": (LONG | {"layer_types": "LG"}, "one for each of the 3 layers"),
    "a pattern without a window": ({"layer_types": "LLG"}, "sliding_window is not set"),
    "a number": ({"layer_types": 3}, "layer_types=3 must be a list"),
    "too few words": ({"canon_set": ("A", "B")}, r"canon_set=\('A', 'B'\) must be a word for each of the 3"),
    "one word": ({"canon_set": "ABC"}, "canon_set='ABC' must be a list"),
    "another letter": ({"canon_set": ("A", "BD", "")}, r"canon_set=\('A', 'BD', ''\).*letters A, B, K and C"),
    "a small letter": ({"canon_set": ("a", "", "")}, r"canon_set=\('a', '', ''\).*letters A, B, K and C"),
    "one tap": ({"canon_kernel": 1}, "canon_kernel=1 must be at least 2"),
    "no tap": ({"canon_kernel": 0}, "canon_kernel=0 must be at least 2"),
    "half a tap": ({"canon_kernel": 2.5}, "canon_kernel=2.5 must be a whole number"),
    "convolutions of latent heads": (
        LATENT | {"canon_set": ("A", "B", "")},
        r"canon_set=\('A', 'B', ''\): latent attention has no convolutions B and K",
    ),
    "too few numbers": ({"no_rope_layers": (1, 0)}, r"no_rope_layers=\(1, 0\) must be 3 numbers, 1 for"),
    "no numbers": ({"no_rope_layers": ()}, r"no_rope_layers=\(\) must be 3 numbers"),
    "a two": ({"no_rope_layers": (1, 2, 0)}, r"no_rope_layers=\(1, 2, 0\) must be 3 numbers, 1 for.*and 0"),
    "truths": ({"no_rope_layers": (True, True, False)}, "no_rope_layers=True must be a whole number"),
    "latents without positions": (
        LATENT | {"no_rope_layers": (1, 1, 0)},
        r"no_rope_layers=\(1, 1, 0\): latent attention has none",
    ),
    "latents with a scale": (LATENT | {"use_ssmax": True}, "use_ssmax=True: latent attention has none"),
    "a power of no logarithm": ({"ssmax_power": 2.0}, "ssmax_power=2.0 .*1 without use_ssmax"),
    "a power of 0": ({"use_ssmax": True, "ssmax_power": 0.0}, "ssmax_power=0.0 must be above 0"),
    "a number for a truth": ({"use_ssmax": 1}, "use_ssmax=1 must be true or false"),
    "no length to begin at": (
        {"use_ssmax": True, "max_position_embeddings": 1},
        "max_position_embeddings=1 .*use_ssmax.*at least 2",
    ),
    "another beginning": (
        {"attention_init": "copy"},
        r"attention_init='copy' must be one of \['normal', 'induction', 'copying'\]",
    ),
    "nothing that shifts": (
        {"attention_init": "induction"},
        r'attention_init="induction" shifts the keys of full layers \[0, 1, 2\].*B or K in canon_set=None',
    ),
    "nothing that shifts in one layer": (
        {"attention_init": "induction", "canon_set": ("B", "AC", "K")},
        r"each needs B or K in canon_set=\('B', 'AC', 'K'\)",
    ),
    "latents as induction heads": (
        LATENT | {"attention_init": "induction"},
        "induction.*latent attention has no shift",
    ),
    "no full layer to begin so": (
        {"attention_init": "induction", "sliding_window": 4, "canon_set": ("B", "B", "B")},
        "induction.*there is no full layer",
    ),
    "a negative width": (
        {"embedding_initializer_range": -0.1},
        "embedding_initializer_range=-0.1 must not be negative",
    ),
    "no number": (
        {"embedding_initializer_range": float("nan")},
        "embedding_initializer_range=nan must be a finite number",
    ),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_settings_that_make_no_sense_are_refused(case):
    changes, message = NONSENSE[case]
    with pytest.raises(ValueError, match=message):
        replace(BASE, **changes)


def test_a_config_of_patterns_and_words_survives_json_and_a_folder(tmp_path):
    for name in ("long context", "long context, full in the middle", "long context of experts"):
        decoder, ids = drawn(name), tokens()
        config = decoder.config
        assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        decoder.save_pretrained(tmp_path / name)
        again = Decoder.from_pretrained(tmp_path / name)
        assert again.config == config and torch.equal(again(ids).logits, decoder(ids).logits)
    short = config.to_dict() | {"layer_types": "LLG"}
    assert DecoderConfig.from_dict(short) == config


def test_long_context_can_be_set_on_the_command_line():
    overrides = [
        "model.num_hidden_layers=3",
        "model.layer_types=LLG",
        "model.sliding_window=8",
        "model.no_rope_layers=[1, 1, 0]",
        "model.use_ssmax=true",
        'model.canon_set=["AC", "", "AB"]',
        "model.canon_kernel=3",
        "model.attention_init=induction",
        "model.embedding_initializer_range=0.5",
    ]
    run = load_settings("tiny", None, overrides)
    assert run.model.layer_types == (L, L, G)
    assert (run.model.no_rope_layers, run.model.canon_set) == ((1, 1, 0), ("AC", "", "AB"))
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    listed = change(run, None, [f'model.layer_types=["{L}", "{G}", "{G}"]', 'model.canon_set=["", "B", "K"]'])
    assert listed.model.layer_types == (L, G, G)
    more = change(run, None, ["model.layer_types=none", "model.attention_init=normal"])
    assert more.model.window(2) == 8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layer_types=LLQ", "layer_types='LLQ' must be letters"),
        ("model.layer_types=3", r"model.layer_types=3 must be a list"),
        ('model.layer_types=["L", "G"]', r"must be one of \['full_attention', 'sliding_attention'\]"),
        ("model.canon_set=AC", "model.canon_set='AC' must be a list of str"),
        ("model.canon_sets=[]", "no key 'canon_sets'. Did you mean 'canon_set'?"),
        ("model.no_rope_layers=[1, true]", "must be int, got bool"),
        ("model.attention_init=random", r"must be one of \['normal', 'induction', 'copying'\]"),
        ("model.use_ssmax=yes", "model.use_ssmax='yes' must be bool"),
    ],
)
def test_a_wrong_word_on_the_command_line_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_settings("tiny", None, [override])


# Other formats

UNKNOWN = {
    "logits that grow": ({"use_ssmax": True}, "use_ssmax would be False instead of True"),
    "a layer without positions": (
        {"no_rope_layers": (1, 0, 1)},
        r"no_rope_layers would be None instead of \(1, 0, 1\)",
    ),
    "convolutions": ({"canon_set": ("A", "", "C")}, r"canon_set would be None instead of \('A', '', 'C'\)"),
    "everything": (LONG, "(?=.*use_ssmax)(?=.*no_rope_layers)(?=.*canon_set)"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_no_architecture_of_transformers_computes_it_and_the_settings_are_named(case, tmp_path, capsys):
    changes, message = UNKNOWN[case]
    decoder = Decoder(replace(BASE, **changes))
    for layout in ("hub", "packed"):
        with pytest.raises(ValueError, match=rf"(?s)no architecture of transformers .*{message}"):
            decoder.save_pretrained(tmp_path / "theirs", layout=layout)
    decoder.save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "x.gguf"), "--to", "gguf"]) == 2
    error = capsys.readouterr().err
    assert "no architecture of transformers" in error or "model_type" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


def test_settings_that_change_no_result_keep_no_model_from_another_format():
    plain = describe_as(replace(BASE, use_qk_norm=True))
    written = replace(
        BASE,
        use_qk_norm=True,
        embedding_initializer_range=0.5,
        no_rope_layers=(1, 1, 1),
        canon_set=("", "", ""),
        canon_kernel=7,
    )
    assert describe_as(written) == plain
    trained = LONG | {"embedding_initializer_range": 0.5}
    assert essence(replace(BASE, **trained)) == essence(replace(BASE, **LONG, **{}))
    assert essence(replace(BASE, **(LONG | {"attention_init": "normal"}))) == essence(replace(BASE, **LONG))
    assert essence(replace(BASE, **(LONG | {"canon_kernel": 5}))) != essence(replace(BASE, **LONG))


# What it costs


def test_convolutions_and_scales_count_as_parameters_and_not_as_operations():
    for name, changes in VARIANTS.items():
        without = {
            key: value
            for key, value in changes.items()
            if key not in ("canon_set", "use_ssmax", "ssmax_power")
        }
        with_them, plain = replace(BASE, **changes), replace(BASE, **(without | {"attention_init": "normal"}))
        assert flops_per_token(with_them, 100) == flops_per_token(plain, 100), name
    more = count_parameters(replace(BASE, **LONG)).total
    less = count_parameters(replace(BASE, **(LONG | {"use_ssmax": False, "canon_kernel": 2}))).total
    channels = 24 * 5 + (6 + 2 + 2) * 8  # A and C, A and C, A; queries, keys and values
    assert more - less == 2 * channels + 6
