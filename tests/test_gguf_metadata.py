"""The metadata of a GGUF file: sizes, positions and tokens, under the names of the gguf package."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf_models import MODELS, SIZES, change_config, export_tiny, read, save_tiny  # noqa: E402

from moe.hf.gguf import export_gguf  # noqa: E402
from moe.hf.gguf_families import FAMILIES  # noqa: E402
from moe.train.tokenizer import BPETokenizer  # noqa: E402

KEYS = gguf.Keys
EVERY = {
    KEYS.LLM.BLOCK_COUNT: 2,
    KEYS.LLM.CONTEXT_LENGTH: 256,
    KEYS.LLM.EMBEDDING_LENGTH: 64,
    KEYS.LLM.FEED_FORWARD_LENGTH: 96,
    KEYS.LLM.VOCAB_SIZE: 300,
    KEYS.Attention.HEAD_COUNT: 4,
    KEYS.Attention.LAYERNORM_RMS_EPS: None,
}
HEADS = {
    KEYS.Attention.HEAD_COUNT_KV: 2,
    KEYS.Attention.KEY_LENGTH: 24,
    KEYS.Attention.VALUE_LENGTH: 24,
    KEYS.Rope.DIMENSION_COUNT: 24,
    KEYS.Rope.FREQ_BASE: 10000.0,
}
HEADS_OF_16 = HEADS | {
    KEYS.Attention.KEY_LENGTH: 16,
    KEYS.Attention.VALUE_LENGTH: 16,
    KEYS.Rope.DIMENSION_COUNT: 16,
}
ONE_LATENT = {
    KEYS.Attention.HEAD_COUNT_KV: 1,
    KEYS.Attention.KEY_LENGTH: 28,
    KEYS.Attention.VALUE_LENGTH: 20,
    KEYS.Attention.KEY_LENGTH_MLA: 24,
    KEYS.Attention.VALUE_LENGTH_MLA: 12,
    KEYS.Attention.Q_LORA_RANK: 24,
    KEYS.Attention.KV_LORA_RANK: 20,
    KEYS.Rope.DIMENSION_COUNT: 8,
    KEYS.Rope.FREQ_BASE: 10000.0,
}
FIVE = {KEYS.LLM.EXPERT_COUNT: 5, KEYS.LLM.EXPERT_USED_COUNT: 2}
WIDE, NARROW = {KEYS.LLM.EXPERT_FEED_FORWARD_LENGTH: 96}, {KEYS.LLM.EXPERT_FEED_FORWARD_LENGTH: 32}
FOUR = FIVE | NARROW | {KEYS.LLM.EXPERT_COUNT: 4}
SCALES = {
    KEYS.Attention.SCALE: 0.25,
    KEYS.LLM.EMBEDDING_SCALE: 1.5,
    KEYS.LLM.RESIDUAL_SCALE: 0.75,
    KEYS.LLM.LOGIT_SCALE: 3.0,
}
SHARED = FOUR | {
    KEYS.LLM.EXPERT_SHARED_COUNT: 2,
    KEYS.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: 64,
    KEYS.LLM.LEADING_DENSE_BLOCK_COUNT: 1,
}
SIGMOID = {
    KEYS.LLM.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID,
    KEYS.LLM.EXPERT_WEIGHTS_NORM: True,
    KEYS.LLM.EXPERT_WEIGHTS_SCALE: 1.0,
    KEYS.LLM.EXPERT_GROUP_COUNT: 1,
    KEYS.LLM.EXPERT_GROUP_USED_COUNT: 1,
}
METADATA = {
    "llama": HEADS,
    "mistral": HEADS,
    "qwen2": HEADS_OF_16,
    "qwen3": HEADS,
    "granite": HEADS | SCALES,
    "mixtral": HEADS | FIVE | {KEYS.Rope.FREQ_BASE: 1e6},
    "olmoe": HEADS_OF_16 | FIVE | WIDE | {KEYS.Attention.HEAD_COUNT_KV: 4},
    "qwen2_moe": HEADS_OF_16 | FIVE | NARROW | {KEYS.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: 48},
    "qwen3_moe": HEADS | FIVE | NARROW,
    "granitemoe": HEADS | SCALES | FIVE | WIDE,
    "granitemoeshared": HEADS | SCALES | FIVE | WIDE | {KEYS.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH: 40},
    "gpt_oss": HEADS | FIVE | WIDE | {KEYS.Attention.SLIDING_WINDOW: 8},
    "deepseek_v2": ONE_LATENT
    | SHARED
    | {
        KEYS.LLM.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SOFTMAX,
        KEYS.LLM.EXPERT_WEIGHTS_NORM: False,
        KEYS.LLM.EXPERT_WEIGHTS_SCALE: 1.0,
    },
    "deepseek_v3": ONE_LATENT
    | SHARED
    | SIGMOID
    | {
        KEYS.LLM.EXPERT_COUNT: 8,
        KEYS.LLM.EXPERT_WEIGHTS_SCALE: 2.5,
        KEYS.LLM.EXPERT_GROUP_COUNT: 4,
        KEYS.LLM.EXPERT_GROUP_USED_COUNT: 2,
    },
    "glm4_moe": HEADS | SHARED | SIGMOID | {KEYS.Rope.DIMENSION_COUNT: 12},
    "dots1": HEADS | SHARED | SIGMOID | {KEYS.Attention.HEAD_COUNT_KV: 4},
    "ernie4_5_moe": HEADS | SHARED | {KEYS.LLM.INTERLEAVE_MOE_LAYER_STEP: 1, KEYS.Rope.FREQ_BASE: 500000.0},
    "minimax_m2": HEADS | FIVE | WIDE | {KEYS.LLM.EXPERT_GATING_FUNC: gguf.ExpertGatingFuncType.SIGMOID},
}


@pytest.mark.parametrize("family", MODELS)
def test_the_metadata_say_what_the_config_says(tmp_path, family):
    model, result, metadata, _ = export_tiny(tmp_path, family)
    arch = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[FAMILIES[family].arch]]
    assert metadata[KEYS.General.ARCHITECTURE] == arch == result.architecture
    expected = {key.format(arch=arch): value for key, value in (EVERY | METADATA[family]).items()}
    expected[KEYS.Attention.LAYERNORM_RMS_EPS.format(arch=arch)] = pytest.approx(model.config.rms_norm_eps)
    assert {key: value for key, value in metadata.items() if key.startswith(f"{arch}.")} == expected


YARN = {
    "rope_type": "yarn",
    "rope_theta": 5e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
ROPE = {
    "linear": (
        {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0},
        {KEYS.Rope.SCALING_TYPE: "linear", KEYS.Rope.SCALING_FACTOR: 2.0},
    ),
    "yarn": (
        YARN,
        {
            KEYS.Rope.SCALING_TYPE: "yarn",
            KEYS.Rope.SCALING_FACTOR: 4.0,
            KEYS.Rope.SCALING_ORIG_CTX_LEN: 64,
            KEYS.Rope.SCALING_YARN_BETA_FAST: 16.0,
            KEYS.Rope.SCALING_YARN_BETA_SLOW: 2.0,
        },
    ),
    "yarn with a factor": (
        {**YARN, "attention_factor": 1.3},  # llama.cpp multiplies by 1 + ln(4)/10
        {KEYS.Rope.SCALING_ATTN_FACTOR: pytest.approx(1.3 / 1.138629436)},
    ),
}


@pytest.mark.parametrize("name", ROPE)
def test_scaled_positions_are_told(tmp_path, name):
    given, expected = ROPE[name]
    _, _, metadata, _ = export_tiny(tmp_path, "qwen3", rope_parameters=given)
    assert metadata["qwen3.rope.freq_base"] == 5e4
    assert {key.format(arch="qwen3"): value for key, value in expected.items()}.items() <= metadata.items()


def test_yarn_of_deepseek_is_told_as_llama_cpp_expects_it(tmp_path):
    _, _, metadata, _ = export_tiny(
        tmp_path, "deepseek_v3", rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}
    )
    assert metadata[KEYS.Rope.SCALING_YARN_LOG_MUL.format(arch="deepseek2")] == pytest.approx(0.07)


def test_rope_scaling_of_older_files_means_the_same(tmp_path):
    _, _, new, _ = export_tiny(tmp_path, "qwen3", rope_parameters=YARN)
    change_config(
        tmp_path / "model", rope_parameters=None, rope_theta=5e4, rope_scaling={**YARN, "type": "yarn"}
    )
    export_gguf(tmp_path / "model", tmp_path / "old.gguf")
    assert read(tmp_path / "old.gguf")[0] == new


def test_llama3_positions_are_a_tensor_of_divisors(tmp_path):
    given = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model, _, _, tensors = export_tiny(tmp_path, "llama", rope_parameters=given)
    plain = 1e4 ** -(torch.arange(0, 24, 2) / 24)
    torch.testing.assert_close(plain / tensors["rope_freqs.weight"], model.model.rotary_emb.inv_freq)


def test_a_window_that_llama_cpp_does_not_slide_ends_the_context(tmp_path):
    _, result, metadata, _ = export_tiny(tmp_path, "mistral", sliding_window=40)
    assert metadata["llama.context_length"] == 40
    assert any("40" in note and "window" in note for note in result.notes)


def test_layers_that_look_further_ahead_are_left_out_with_a_note(tmp_path):
    save_tiny(tmp_path / "model", "deepseek_v3")
    file = tmp_path / "model" / "model.safetensors"
    save_file(load_file(file) | {"model.layers.2.eh_proj.weight": torch.zeros(64, 128)}, file)
    result = export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert any("layer 2" in note for note in result.notes)
    assert not any("blk.2" in name for name in read(tmp_path / "model.gguf")[1])


# The tokenizer


@pytest.fixture
def with_tokenizer(tmp_path):
    """A folder with a byte-level tokenizer of 290 tokens beside a model of 300."""
    pytest.importorskip("tokenizers")
    save_tiny(tmp_path / "model", "qwen3_moe")
    tokenizer = BPETokenizer.train(["the expert router sends every token to two of many experts"] * 9, 290)
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    config = {"eos_token": "<|endoftext|>", "add_bos_token": False, "chat_template": "{{ messages }}"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path / "model", tokenizer


def test_byte_level_tokens_are_in_the_file(with_tokenizer, tmp_path):
    folder, tokenizer = with_tokenizer
    assert export_gguf(folder, tmp_path / "model.gguf").notes == ()
    metadata, _ = read(tmp_path / "model.gguf")
    stored = json.loads(tokenizer.json)["model"]
    tokens, kinds = metadata[KEYS.Tokenizer.LIST], metadata[KEYS.Tokenizer.TOKEN_TYPE]
    assert metadata[KEYS.Tokenizer.MODEL] == "gpt2" and metadata[KEYS.Tokenizer.PRE] == "gpt-2"
    assert len(tokens) == len(kinds) == 300
    assert {word: tokens.index(word) for word in stored["vocab"]} == stored["vocab"]
    assert kinds[tokenizer.end_of_text] == gguf.TokenType.CONTROL
    assert set(kinds[tokenizer.vocab_size :]) == {gguf.TokenType.UNUSED}
    assert [kinds[i] for i in range(tokenizer.vocab_size) if i != tokenizer.end_of_text].count(1) == len(
        stored["vocab"]
    ) - 1
    assert metadata[KEYS.Tokenizer.MERGES] == [" ".join(pair) for pair in stored["merges"]]
    assert metadata[KEYS.Tokenizer.EOS_ID] == tokenizer.end_of_text
    assert metadata[KEYS.Tokenizer.ADD_BOS] is False
    assert metadata[KEYS.Tokenizer.CHAT_TEMPLATE] == "{{ messages }}"


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(("pattern", "name"), [(LLAMA_3, "llama-bpe"), (r"\w+", None)])
def test_the_way_to_cut_words_has_its_name_or_a_note(with_tokenizer, tmp_path, pattern, name):
    folder, tokenizer = with_tokenizer
    data = json.loads(tokenizer.json)
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    notes = export_gguf(folder, tmp_path / "model.gguf").notes
    assert read(tmp_path / "model.gguf")[0].get(KEYS.Tokenizer.PRE) == name
    assert bool(notes) == (name is None)


@pytest.mark.parametrize(
    ("tokenizer", "word"),
    [
        (None, "no tokenizer.json"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
        ({"model": {"type": "BPE", "vocab": {}}, "pre_tokenizer": {"type": "Metaspace"}}, "byte-level"),
    ],
)
def test_a_tokenizer_that_is_not_written_is_noted(tmp_path, tokenizer, word):
    save_tiny(tmp_path / "model", "qwen3_moe")
    if tokenizer:
        (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (note,) = export_gguf(tmp_path / "model", tmp_path / "model.gguf").notes
    assert word in note
    metadata, _ = read(tmp_path / "model.gguf")
    assert metadata[KEYS.Tokenizer.MODEL] == "none" and KEYS.Tokenizer.LIST not in metadata


def test_a_tokenizer_larger_than_the_model_is_refused(with_tokenizer, tmp_path):
    folder, tokenizer = with_tokenizer
    data = json.loads(tokenizer.json)
    data["added_tokens"].append({"id": SIZES["vocab_size"], "content": "<more>", "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="up to id 300"):
        export_gguf(folder, tmp_path / "model.gguf")
