"""Checkpoints of Hugging Face families: read with the logits of transformers, written back to the byte."""

import json
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed")

import tiny
import transformers

from moe import Decoder, DecoderConfig
from moe.hf.export import essence
from moe.hf.families import FAMILIES, decoder_config
from moe.hf.tensor_names import find_place

NATIVE = [name for name in FAMILIES if name != "kimi_k2"]  # no class of its own in transformers
LAYOUTS = ["hub", "packed"]
IDS = torch.randint(3, 120, (2, 19), generator=torch.Generator().manual_seed(1))
QUIET = [
    pytest.mark.filterwarnings("ignore:Initializing zero-element tensors"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
pytestmark = QUIET


def model_class(family: str) -> type:
    module = import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, FAMILIES[family].architecture)


def tiny_model(family: str, **changes: object) -> nn.Module:
    kind = model_class(family)
    torch.manual_seed(0)
    return tiny.redraw(kind(tiny.tiny_config(kind.config_class, **changes))).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(family, layout) -> a folder that transformers wrote, once for all tests."""
    made: dict[tuple[str, str], Path] = {}

    def folder(family: str, layout: str = "hub") -> Path:
        if (family, layout) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{layout}")
            tiny_model(family).save_pretrained(path, save_original_format=layout == "hub")
            made[family, layout] = path
        return made[family, layout]

    return folder


def theirs_of(folder: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    found, expected = weights_of(ours), weights_of(theirs)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", NATIVE)
def test_logits_are_those_of_transformers(folders, family, layout):
    ours, theirs = Decoder.from_pretrained(folders(family, layout)), theirs_of(folders(family))
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert (ours(IDS).logits - expected).abs().max() <= 1e-5 < expected.abs().max() / 1e5


@pytest.mark.parametrize("family", NATIVE)
def test_every_gradient_is_that_of_transformers(folders, family):
    ours, theirs = Decoder.from_pretrained(folders(family)), theirs_of(folders(family))
    upstream = torch.randn(*IDS.shape, 131, generator=torch.Generator().manual_seed(2)) / 100
    for model in (ours, theirs):
        model.requires_grad_()
    (ours(IDS).logits * upstream).sum().backward()
    (theirs(IDS).logits * upstream).sum().backward()
    parameters, compared = dict(ours.named_parameters()), 0
    for key, parameter in theirs.named_parameters():
        if parameter.grad is None:
            continue
        place = find_place(key)
        gradient = place.view(parameters[place.name].grad)
        assert (gradient - parameter.grad).abs().max() <= 1e-5, key
        compared += parameter.numel()
    assert compared >= 0.99 * sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("family", [name for name in NATIVE if FAMILIES[name].is_moe])
def test_experts_are_those_that_transformers_chooses(folders, family):
    ours, theirs = Decoder.from_pretrained(folders(family)), theirs_of(folders(family))
    chosen: list[Tensor] = []
    for module in theirs.modules():
        if re.search(r"(Router|TopKRouter|TopkRouter)$", type(module).__name__):
            module.register_forward_hook(
                lambda _m, _i, out: chosen.extend(t for t in out if t.dtype == torch.int64)
            )
    with torch.no_grad():
        theirs(IDS)
        routings = ours(IDS).routings
    assert len(chosen) == len(routings) > 0
    for routing, indices in zip(routings, chosen, strict=True):
        assert torch.equal(routing.experts.sort(-1).values, indices.sort(-1).values)


@pytest.mark.parametrize("family", NATIVE)
def test_greedy_generation_with_a_cache_gives_the_same_tokens(folders, family):
    ours, theirs = Decoder.from_pretrained(folders(family)), theirs_of(folders(family))
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(IDS, max_new_tokens=32, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(IDS, max_new_tokens=32, temperature=0), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", NATIVE)
def test_what_was_read_is_written_back(folders, family, layout, tmp_path):
    source = folders(family, layout)
    Decoder.from_pretrained(source).save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", source)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "again", source))
    assert ours == theirs


@pytest.mark.parametrize("family", NATIVE)
def test_either_layout_can_be_written_from_the_other(folders, family, tmp_path):
    for source, target in (("hub", "packed"), ("packed", "hub")):
        Decoder.from_pretrained(folders(family, source)).save_pretrained(tmp_path / target, layout=target)
        assert_same_tensors(tmp_path / target, folders(family, target))


def test_shards_are_read_and_written(folders, tmp_path):
    decoder = Decoder.from_pretrained(folders("mixtral"))
    decoder.save_pretrained(tmp_path / "shards", max_shard_bytes=100_000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    again = Decoder.from_pretrained(tmp_path / "shards")
    assert all(map(torch.equal, again.state_dict().values(), decoder.state_dict().values()))
    assert_same_tensors(tmp_path / "shards", folders("mixtral"))
    with torch.no_grad():
        assert (theirs_of(tmp_path / "shards")(IDS).logits - again(IDS).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16], ids=str)
def test_stored_dtypes_are_kept_and_come_back(folders, tmp_path, bias):
    shutil.copytree(folders("deepseek_v3"), tmp_path / "half")
    weights = {
        key: tensor.to(bias if "correction_bias" in key else torch.bfloat16)
        for key, tensor in weights_of(tmp_path / "half").items()
    }
    save_file(weights, tmp_path / "half" / "model.safetensors")
    decoder = Decoder.from_pretrained(tmp_path / "half")
    assert decoder.model.embed_tokens.weight.dtype == torch.bfloat16
    assert decoder.model.layers[1].mlp.router.e_score_correction_bias.dtype == torch.float32
    decoder.save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "half")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


# Configs


@pytest.mark.parametrize("family", NATIVE)
def test_missing_keys_mean_what_the_config_class_says(family):
    """All that a family's class knows, against the sizes alone."""
    given = {"num_experts_per_tok": 2, "num_attention_heads": 32}  # not always there, or not a divisor
    whole = model_class(family).config_class(**given)
    sizes = {"model_type": family, **given}
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes |= {name: getattr(whole, name) for name in names}
    assert essence(decoder_config(sizes)) == essence(decoder_config({**whole.to_dict(), **given}))


ROPE = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0},
    "yarn, a ramp that is not cut": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8,
        "truncate": False,
        "attention_factor": 1.5,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.4],
        "long_factor": [1.5, 2.0, 4.0, 9.0],
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("length", [11, 27, 40])
@pytest.mark.parametrize("kind", ROPE)
def test_stretched_rotary_embedding_is_that_of_transformers(kind, length, tmp_path):
    """Below the first context, beyond it, and beyond max_position_embeddings."""
    scaling = {"rope_type": kind, "rope_theta": 100.0} | ROPE[kind]
    tiny_model("llama", rope_parameters=scaling, max_position_embeddings=32).save_pretrained(tmp_path)
    ids = torch.randint(3, 120, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = theirs_of(tmp_path)(ids).logits
        ours = Decoder.from_pretrained(tmp_path)(ids).logits
    assert (ours - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latent_attention_is_tempered_as_in_transformers(family, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7}
    changes = {"rope_parameters": yarn | {"mscale_all_dim": 1.3}, "q_lora_rank": None}
    tiny_model(family, max_position_embeddings=64, **changes).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs_of(tmp_path)(IDS).logits
        assert (Decoder.from_pretrained(tmp_path)(IDS).logits - expected).abs().max() <= 1e-5


def test_the_older_keys_of_rotary_embedding_are_read():
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}}
    old = {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    sizes = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 4}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    assert decoder_config(sizes | old) == decoder_config(sizes | new)


CHANGES = {
    "mixtral with a window": ("mixtral", {"sliding_window": 5}),
    "mistral without a window": ("mistral", {"sliding_window": None}),
    "qwen2_moe, sliding and dense layers": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "mlp_only_layers": [1]},
    ),
    "qwen3 with late windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3_moe, every other layer sparse": ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "olmoe, clipped and biased": ("olmoe", {"clip_qkv": 0.3, "attention_bias": True}),
    "granitemoe with its multipliers": (
        "granitemoe",
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
        },
    ),
    "deepseek_v2 in groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2, "q_lora_rank": None},
    ),
    "deepseek_v3 with halves that turn, biased": (
        "deepseek_v3",
        {"rope_interleave": False, "attention_bias": True, "n_shared_experts": 2},
    ),
    "glm4_moe with norms": ("glm4_moe", {"use_qk_norm": True, "attention_bias": True}),
    "ernie4_5_moe, dense at both ends": (
        "ernie4_5_moe",
        {"moe_layer_start_index": 1, "moe_layer_end_index": 1, "tie_word_embeddings": False},
    ),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CHANGES)
def test_settings_of_a_family_are_followed(case, tmp_path):
    family, changes = CHANGES[case]
    tiny_model(family, **changes).save_pretrained(tmp_path / "theirs")
    ours, theirs = Decoder.from_pretrained(tmp_path / "theirs"), theirs_of(tmp_path / "theirs")
    with torch.no_grad():
        assert (ours(IDS).logits - theirs(IDS).logits).abs().max() <= 1e-5
    expected = theirs.generate(IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(IDS, max_new_tokens=12, temperature=0), expected)
    ours.save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "theirs")


# What a checkpoint may hold besides


def test_layers_that_predict_further_ahead_and_old_buffers_are_left_out(folders, tmp_path):
    shutil.copytree(folders("deepseek_v3"), tmp_path / "more")
    weights = weights_of(tmp_path / "more")
    more = {
        key.replace("layers.2.", "layers.3."): tensor for key, tensor in weights.items() if "layers.2" in key
    }
    more |= {"model.layers.3.eh_proj.weight": torch.zeros(3, 3)}
    more |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(
        {key: tensor.clone() for key, tensor in (weights | more).items()},
        tmp_path / "more" / "model.safetensors",
    )
    ours, without = (Decoder.from_pretrained(f) for f in (tmp_path / "more", folders("deepseek_v3")))
    assert all(map(torch.equal, ours.state_dict().values(), without.state_dict().values()))


def test_a_tied_head_may_be_stored_and_must_then_be_the_embedding(folders, tmp_path):
    shutil.copytree(folders("ernie4_5_moe"), tmp_path / "tied")
    weights = weights_of(tmp_path / "tied")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "tied" / "model.safetensors")
    Decoder.from_pretrained(tmp_path / "tied").save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "tied")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "tied" / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings=true, but .* differ"):
        Decoder.from_pretrained(tmp_path / "tied")


def mxfp4_folder(source: Path, target: Path) -> dict[str, Tensor]:
    """A gpt-oss with experts drawn as 4-bit blocks; returns their values as transformers decodes them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    shutil.copytree(source, target)
    weights, decoded = weights_of(target), {}
    generator = torch.Generator().manual_seed(4)
    for key in [key for key in weights if re.search(r"experts\.(gate_up|down)_proj$", key)]:
        e, inputs, outputs = weights.pop(key).shape
        blocks = torch.randint(0, 256, (e, outputs, inputs // 32, 16), generator=generator).byte()
        scales = torch.randint(118, 126, (e, outputs, inputs // 32), generator=generator).byte()
        weights |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        decoded[key] = convert_moe_packed_tensors(blocks, scales).contiguous()
    save_file(weights, target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (target / "config.json").write_text(json.dumps(config))
    return decoded


def test_experts_in_4_bits_are_decoded_as_transformers_does(tmp_path):
    tiny_model("gpt_oss", hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "plain")
    decoded = mxfp4_folder(tmp_path / "plain", tmp_path / "packed")
    decoder = Decoder.from_pretrained(tmp_path / "packed")
    state = decoder.state_dict()
    assert len(decoded) == 6
    for key, tensor in decoded.items():
        assert state[key].dtype == torch.bfloat16 and torch.equal(state[key], tensor)
    decoder.save_pretrained(tmp_path / "written")
    written = weights_of(tmp_path / "written")
    assert written.keys() == weights_of(tmp_path / "plain").keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in decoded.items())
    assert "quantization_config" not in json.loads((tmp_path / "written" / "config.json").read_text())


def test_4_bits_need_their_scales_and_the_shapes_that_go_with_them(tmp_path):
    tiny_model("gpt_oss", hidden_size=64, intermediate_size=96).save_pretrained(tmp_path / "plain")
    mxfp4_folder(tmp_path / "plain", tmp_path / "packed")
    weights = weights_of(tmp_path / "packed")
    first, second = (f"model.layers.{i}.mlp.experts.down_proj" for i in (0, 1))
    del weights[f"{first}_scales"], weights[f"{second}_blocks"]
    weights["model.layers.2.mlp.experts.down_proj_scales"] = torch.zeros(6, 64, 4, dtype=torch.uint8)
    save_file(weights, tmp_path / "packed" / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Decoder.from_pretrained(tmp_path / "packed")
    for line in (f"missing: {first}_scales", f"missing: {second}_blocks", "is U8 (6 64 4), not U8 (6 64 3)"):
        assert line in str(error.value)


def test_kimi_k2_is_read_as_deepseek_v3(folders, tmp_path):
    shutil.copytree(folders("deepseek_v3"), tmp_path / "kimi")
    config = json.loads((tmp_path / "kimi" / "config.json").read_text())
    (tmp_path / "kimi" / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2"}))
    ours, other = Decoder.from_pretrained(tmp_path / "kimi"), Decoder.from_pretrained(folders("deepseek_v3"))
    assert torch.equal(ours(IDS).logits, other(IDS).logits)


# Refusals


def with_config(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtrall"}, "'mixtrall' is no decoder known here. Did you mean 'mixtral'"),
        (
            {"model_type": "own", "auto_map": {"AutoModel": "x.Y"}},
            "comes with code of its own .* never run",
        ),
        ({"num_local_experts": 8}, "num_experts is 8 in config.json, but 6 by the tensors"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2 in config.json, but 3 by the tensors"),
        ({"vocab_size": 130}, "vocab_size is 130 in config.json, but 131 by the tensors"),
        ({"hidden_size": 24}, "hidden_size is 24 in config.json, but 48 by the tensors"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised with 'fp8', which is not decoded here"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_parameters": {"rope_type": "spiral", "factor": 2.0}}, "rope_type='spiral' must be one of"),
        ({"num_attention_heads": 7}, "num_attention_heads=7"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(folders, tmp_path, changes, message):
    folder = with_config(folders("mixtral"), tmp_path / "bad", **changes)
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        Decoder.from_pretrained(folder)


def test_dense_layers_of_another_activation_are_refused(folders, tmp_path):
    folder = with_config(folders("glm4_moe"), tmp_path / "gelu", hidden_act="gelu")
    with pytest.raises(ValueError, match="hidden_act='gelu': dense layers here are SwiGLU"):
        Decoder.from_pretrained(folder)


def test_everything_that_does_not_fit_is_listed_at_once(folders, tmp_path):
    shutil.copytree(folders("mixtral"), tmp_path / "bad")
    weights = weights_of(tmp_path / "bad")
    experts = "model.layers.1.block_sparse_moe.experts"
    del weights[f"{experts}.2.w3.weight"], weights["model.norm.weight"]
    weights[f"{experts}.0.w1.weight"] = torch.zeros(3, 48)
    weights["model.layers.0.self_attn.extra.weight"] = torch.zeros(2)
    weights["model.layers.0.mlp.experts.0.down_proj.weight"] = torch.zeros(48, 44)  # as experts.0.w2 is
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(48, 48, dtype=torch.int32)
    save_file(weights, tmp_path / "bad" / "model.safetensors")
    with pytest.raises(ValueError) as error:
        Decoder.from_pretrained(tmp_path / "bad")
    for line in (
        "missing: model.layers.1.mlp.experts.gate_up_proj of expert 2 up_proj",
        "missing: model.norm.weight (48)",
        f"wrong shape: {experts}.0.w1.weight is (3 48), the model has (44 48)",
        "unexpected: model.layers.0.self_attn.extra.weight (2)",
        "are the same tensor of the model",
        "not decoded: model.layers.0.self_attn.q_proj.weight is I32",
    ):
        assert line in str(error.value)


def test_eight_bit_floats_are_named(folders, tmp_path):
    shutil.copytree(folders("olmoe"), tmp_path / "eight")
    weights = weights_of(tmp_path / "eight")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "eight" / "model.safetensors")
    with pytest.raises(ValueError, match=r"not decoded: model\.norm\.weight is F8_E4M3"):
        Decoder.from_pretrained(tmp_path / "eight")


def test_pickled_weights_are_refused(folders, tmp_path):
    shutil.copytree(folders("olmoe"), tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin: .* as safetensors"):
        Decoder.from_pretrained(tmp_path / "pickled")


def test_files_that_are_missing_cut_or_elsewhere_are_refused(folders, tmp_path):
    Decoder.from_pretrained(folders("olmoe")).save_pretrained(tmp_path / "shards", max_shard_bytes=100_000)
    index = tmp_path / "shards" / "model.safetensors.index.json"
    first = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{first.name} is truncated"):
        Decoder.from_pretrained(tmp_path / "shards")
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"{first.name} is missing"):
        Decoder.from_pretrained(tmp_path / "shards")
    (tmp_path / first.name).write_bytes(content)
    index.write_text(index.read_text().replace(first.name, f"../{first.name}"))
    with pytest.raises(ValueError, match="leads outside the folder"):
        Decoder.from_pretrained(tmp_path / "shards")


# Ours as theirs

NATIVE_SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
EXPERTS = {"moe_intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2}
SIGMOID = {"scoring_func": "sigmoid", "use_selection_bias": True, "routed_scaling_factor": 2.0}
EXPORTS = {
    "glm4_moe": EXPERTS | SIGMOID | {"use_qk_norm": True},
    "glm4_moe, shared": EXPERTS | SIGMOID | {"n_shared_experts": 2, "first_k_dense_replace": 1},
    "mixtral": EXPERTS | {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "olmoe": EXPERTS | {"norm_topk_prob": False, "use_qk_norm": True, "qk_norm": "full"},
    "qwen3_moe": EXPERTS | {"use_qk_norm": True, "norm_topk_prob": False, "decoder_sparse_step": 2},
    "qwen2_moe": EXPERTS
    | {"n_shared_experts": 1, "shared_expert_gate": True, "attention_bias": True, "norm_topk_prob": False},
    "deepseek_v3": EXPERTS
    | SIGMOID
    | {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    | {"n_group": 3, "topk_group": 2, "rope_interleave": True},
    "minimax_m2": EXPERTS | SIGMOID | {"use_qk_norm": True, "qk_norm": "full", "routed_scaling_factor": 1.0},
    "llama": {},
    "qwen3": {"use_qk_norm": True},
}


@pytest.mark.parametrize("case", EXPORTS)
def test_a_model_of_ours_is_written_as_the_architecture_that_computes_it(case, tmp_path):
    torch.manual_seed(0)
    decoder = tiny.redraw(Decoder(DecoderConfig(**NATIVE_SIZES, **EXPORTS[case]))).eval()
    decoder.save_pretrained(tmp_path / "theirs", layout="hub")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["model_type"] == case.split(",")[0]
    theirs = theirs_of(tmp_path / "theirs")
    with torch.no_grad():
        assert (theirs(IDS).logits - decoder(IDS).logits).abs().max() <= 1e-5
    expected = theirs.generate(IDS, max_new_tokens=32, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(decoder.generate(IDS, max_new_tokens=32, temperature=0), expected)
    again = Decoder.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(IDS).logits, decoder(IDS).logits)
    again.save_pretrained(tmp_path / "again")
    assert_same_tensors(tmp_path / "again", tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation": "relu2"}, "activation would be 'swiglu' instead of 'relu2'"),
        ({"capacity_factor": 1.5}, "capacity_factor would be None instead of 1.5"),
        ({"attention_sinks": True}, "attention_sinks would be False instead of True"),
        (
            {"apply_router_weight_on_input": True},
            "router_weight_on_input would be False instead of True",
        ),
    ],
)
def test_a_model_that_no_architecture_computes_says_why(changes, reason, tmp_path):
    decoder = Decoder(DecoderConfig(**NATIVE_SIZES, **EXPERTS, **changes))
    with pytest.raises(ValueError, match=rf"(?s)no architecture of transformers .*{reason}"):
        decoder.save_pretrained(tmp_path / "theirs", layout="hub")
    assert not (tmp_path / "theirs").exists()


def test_an_unknown_layout_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="layout='flat' must be 'hub' or 'packed'"):
        Decoder.from_pretrained(folders("llama")).save_pretrained(tmp_path / "x", layout="flat")
