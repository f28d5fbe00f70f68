"""Presets, TOML files and overrides become one checked configuration, or an error that helps."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe.parameters import count_parameters
from moe.train.overrides import change, load_settings, parse_override
from moe.train.presets import PRESETS
from moe.train.settings import RunConfig, TrainConfig, differences


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_back_equal_from_json(name):
    config = PRESETS[name]()
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[optim]\nlr = 0.5\nclip = 3\n[data]\nsuffixes = ['.txt']\n")
    config = load_settings("tiny", file, ["optim.lr=0.25"])
    assert (config.optim.lr, config.optim.clip, config.data.suffixes) == (0.25, 3.0, (".txt",))
    assert config.train == PRESETS["tiny"]().train


def test_differences_name_every_changed_key_and_no_other():
    base = PRESETS["tiny"]()
    assert differences(base, change(base, None, ["train.seed=3"])) == {"train.seed": (0, 3)}
    assert differences(base, base) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=1e-3", 1e-3),
        ("a.b=7", 7),
        ("a.b=true", True),
        ("a.b=bpe", "bpe"),
        ('a.b="7"', "7"),
        ("a.b=['x', 'y']", ["x", "y"]),
        ("a.b=/some/where=else", "/some/where=else"),
    ],
)
def test_an_override_is_a_toml_value_or_a_bare_word(text, value):
    assert parse_override(text) == ("a.b", value)


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=0, max_value=1e6))
def test_every_float_that_python_prints_is_an_override(value):
    assert load_settings("tiny", None, [f"optim.lr={value!r}"]).optim.lr == value


def test_none_stands_for_a_missing_value():
    config = load_settings("tiny", None, ["data.folder=somewhere"])
    assert change(config, None, ["data.folder=none"]).data.folder is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim has no key 'lrr'. Did you mean 'lr'?"),
        ("optimm.lr=1", "no part 'optimm'. Did you mean 'optim'?"),
        ("model.num_expert=8", "Did you mean 'num_experts'?"),
        ("optim.lr=fast", "optim.lr='fast' must be float, got str"),
        ("train.steps=1.5", "train.steps=1.5 must be int, got float"),
        ("train.steps=true", "train.steps=True must be int, got bool"),
        ("train.compile=1", "train.compile=1 must be bool, got int"),
        ("data.suffixes=.txt", "must be a list of str"),
        ("data.tokenizer=word", "must be one of ['bytes', 'bpe']"),
        ("model.hidden_size=none", "must be int, got str"),
        ("optim", "must look like part.key=value"),
        ("optim=3", "'optim' is a table"),
        ("optim.lr=nan", "must be at least 0"),
        ("optim.lr=-1.0", "optim.lr=-1.0 must be at least 0"),
        ("optim.beta2=1.5", "must be between 0 and 1"),
        ("optim.momentum=1.5", "must be between 0 and 1"),
        ("optim.optimizer=lion", "must be one of"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("train.accumulation=3", "train.batch_size=8 must be divisible"),
        ("train.checkpoint_every=7", "must be a multiple of train.log_every=5"),
        ("data.validation_fraction=1.0", "must be between 0 and 1"),
        ("data.sequence_length=9999", "is over model.max_position_embeddings"),
        ("model.vocab_size=512", "bytes have exactly 256 tokens"),
        ("model.vocab_size=100", "must be at least 256"),
        ("data.tokenizer=bpe", 'model.vocab_size=256 with data.tokenizer="bpe" must be at least 258'),
        ("data.tokenizer=bpe", "Set model.vocab_size=4096"),
        ("model.num_experts_per_tok=9", "num_experts_per_tok=9 must be between 1 and num_experts=4"),
    ],
)
def test_a_bad_override_is_refused_with_the_way_out(override, message):
    with pytest.raises(ValueError) as caught:
        load_settings("tiny", None, [override])
    assert message in str(caught.value)


def test_an_unknown_preset_is_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"no preset 'dmeo'\. Did you mean 'demo'"):
        load_settings("dmeo")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlrr = 1", "Did you mean 'lr'"),
        ("[optim]\nlr = 'fast'", "must be float, got str"),
        ("[optim\nlr = 1", "not valid TOML"),
        ("steps = 3", "a run has no part 'steps'"),
        ("[train.deep]\nsteps = 3", "train has no key 'deep'"),
    ],
)
def test_a_bad_toml_file_is_refused_by_name(tmp_path: Path, text, message):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_settings("tiny", file)
    assert message in str(caught.value) and "bad.toml" in str(caught.value)


def test_a_missing_toml_file_is_refused():
    with pytest.raises(FileNotFoundError, match=r"no settings file nowhere\.toml"):
        load_settings("tiny", Path("nowhere.toml"))


def test_an_unknown_key_in_a_run_folder_is_refused():
    data = PRESETS["tiny"]().to_dict()
    data["train"]["step"] = 3
    with pytest.raises(ValueError, match="Did you mean 'steps'"):
        RunConfig.from_dict(data)


def test_the_gpu_preset_has_the_parameters_that_it_claims():
    parameters = count_parameters(PRESETS["gpu-small"]().model)
    assert (round(parameters.total / 1e6), round(parameters.active / 1e6)) == (274, 62)


def test_settings_are_frozen():
    with pytest.raises(AttributeError):
        TrainConfig().steps = 3  # pyright: ignore[reportAttributeAccessIssue]
