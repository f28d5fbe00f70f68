"""GGUF: every tensor and every number comes back, and what llama.cpp would compute otherwise is refused."""

import errno
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from gguf_models import (  # noqa: E402
    MODELS,
    change_config,
    export_tiny,
    parameter,
    read,
    save_tiny,
    tiny_model,
)

from moe.hf import gguf_writer  # noqa: E402
from moe.hf.gguf import export_gguf  # noqa: E402
from moe.hf.gguf_families import FAMILIES  # noqa: E402

PERMUTED = ("llama", "mistral", "mixtral", "granite", "granitemoe", "granitemoeshared")


def types(file: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}


# Tensors


def neighbours_to_halves(rows: Tensor, heads: int) -> Tensor:
    """Within each head: rows 0, 2, 4, ... first, then 1, 3, 5, ..."""
    parts = rows.unflatten(0, (heads, -1))
    return torch.cat([parts[:, 0::2], parts[:, 1::2]], dim=1).flatten(0, 1)


def as_in_the_model(name: str, tensor: Tensor, family: str, model: Any) -> Tensor:
    """A tensor of the file in the order in which transformers has it."""
    config = model.config
    if family in PERMUTED and name.split(".")[-2] in ("attn_q", "attn_k"):
        is_query = name.split(".")[-2] == "attn_q"
        return neighbours_to_halves(
            tensor, config.num_attention_heads if is_query else config.num_key_value_heads
        )
    if family == "gpt_oss" and name.endswith("exps.weight"):
        return tensor.mT
    return tensor


def part_of(name: str, whole: Tensor, family: str, config: Any) -> Tensor:
    """The part of a parameter that has this name."""
    kind = name.split(".")[-2]
    if kind in ("ffn_gate_exps", "ffn_up_exps") or (kind.endswith("_shexp") and family == "granitemoeshared"):
        if kind == "ffn_down_shexp":
            return whole
        is_up = "_up_" in kind
        if family == "gpt_oss":
            return whole[..., int(is_up) :: 2]
        axis = 1 if whole.dim() == 3 else 0
        return whole.chunk(2, axis)[int(is_up)]
    if kind in ("attn_k_b", "attn_v_b"):
        heads = whole.unflatten(0, (config.num_attention_heads, -1))
        nope = config.qk_nope_head_dim
        return heads[:, :nope].mT if kind == "attn_k_b" else heads[:, nope:]
    return whole.reshape(-1) if kind == "exp_probs_b" else whole


@pytest.mark.parametrize("family", MODELS)
def test_every_parameter_is_in_the_file_and_nothing_else(tmp_path, family):
    model, result, _, tensors = export_tiny(tmp_path, family)
    state = {key: tensor for key, tensor in model.state_dict().items() if "inv_freq" not in key}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert result.tensors == len(tensors)
    for name, tensor in tensors.items():
        expected = part_of(name, state[parameter(name, state)], family, model.config)
        found = as_in_the_model(name, tensor, family, model)
        assert torch.equal(found, expected), f"{name} is not {parameter(name, state)}"
    assert {parameter(name, state) for name in tensors} == state.keys()
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in state.values())


def test_every_family_is_tested():
    assert FAMILIES.keys() == MODELS.keys()


@pytest.mark.parametrize("family", MODELS)
def test_the_packed_and_the_sharded_layout_give_the_same_file(tmp_path, family):
    model = save_tiny(tmp_path / "hub", family)
    model.save_pretrained(tmp_path / "packed", save_original_format=False, max_shard_size="100KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    for layout in ("hub", "packed"):
        export_gguf(tmp_path / layout, tmp_path / f"{layout}.gguf")
    hub, packed = read(tmp_path / "hub.gguf")[1], read(tmp_path / "packed.gguf")[1]
    assert hub.keys() == packed.keys()
    assert all(torch.equal(hub[name], packed[name]) for name in hub)


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.bfloat16, "BF16")]
)
def test_matrices_have_the_dtype_and_what_is_small_stays_float32(tmp_path, dtype, kind):
    model, _, metadata, tensors = export_tiny(tmp_path, "glm4_moe", dtype=dtype)
    expected = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}[kind]
    assert metadata["general.file_type"] == gguf.LlamaFileType[expected]
    for name, found in types(tmp_path / "model.gguf").items():
        is_small = tensors[name].dim() == 1 or "gate_inp" in name
        assert found == ("F32" if is_small else kind), name
    down = model.state_dict()["model.layers.1.mlp.experts.down_proj"].to(dtype).float()
    assert torch.equal(tensors["blk.1.ffn_down_exps.weight"], down)


def test_a_stored_dtype_is_kept(tmp_path):
    model = tiny_model("qwen3_moe").bfloat16()
    model.save_pretrained(tmp_path / "model")
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    found = types(tmp_path / "model.gguf")
    assert found["blk.0.ffn_up_exps.weight"] == "BF16" and found["blk.0.ffn_gate_inp.weight"] == "F32"


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # OCP Microscaling Formats 1.0, table 5


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """(e o g 16) and (e o g) -> (e o 32g): two numbers a byte, low half first, times 2^(scale-127)."""
    codes = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2).long()
    numbers = E2M1[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    return (numbers * torch.exp2(scales.float() - 127).unsqueeze(-1)).flatten(-2)


def test_mxfp4_blocks_keep_their_bits(tmp_path):
    save_tiny(tmp_path / "model", "gpt_oss")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    whole = {}
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(key).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 130, (experts, outputs, inputs // 32), dtype=torch.uint8)
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        whole[key.split(".", 2)[2]] = decode_mxfp4(blocks, scales)
    save_file(tensors, file)
    export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    metadata, found = read(tmp_path / "model.gguf")
    assert types(tmp_path / "model.gguf")["blk.0.ffn_up_exps.weight"] == "MXFP4"
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    for layer in range(2):
        gate_up = whole[f"{layer}.mlp.experts.gate_up_proj"]
        assert torch.equal(found[f"blk.{layer}.ffn_gate_exps.weight"], gate_up[:, 0::2])
        assert torch.equal(found[f"blk.{layer}.ffn_up_exps.weight"], gate_up[:, 1::2])
        down = whole[f"{layer}.mlp.experts.down_proj"]
        assert torch.equal(found[f"blk.{layer}.ffn_down_exps.weight"], down)


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "mixtral")
    made, encode = [], gguf_writer._encode

    def encode_alone(entry):
        assert all(earlier() is None for earlier in made), f"{entry.name}: the one before is still there"
        array = encode(entry)
        made.append(weakref.ref(array))
        return array

    monkeypatch.setattr(gguf_writer, "_encode", encode_alone)
    result = export_gguf(tmp_path / "model", tmp_path / "model.gguf", dtype=torch.float16)
    assert len(made) == result.tensors


# What is refused


REFUSED = [
    ("mixtral", {"model_type": "mixtrl"}, "Did you mean 'mixtral'?"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
    ("mixtral", {"num_attention_heads": None}, "lacks num_attention_heads"),
    ("mixtral", {"rms_norm_eps": None}, "lacks rms_norm_eps"),
    ("mixtral", {"num_local_experts": 6}, "says 6"),
    ("mixtral", {"vocab_size": 301}, "vocab_size=301, but the tensors have 300"),
    ("mixtral", {"head_dim": 16}, "head_dim=16, but the tensors have 24"),
    ("mixtral", {"num_hidden_layers": 3}, "num_hidden_layers=3, but the tensors have 2"),
    ("mixtral", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type='dynamic'"),
    ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_theta"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob=True"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads=2"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=False"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("gpt_oss", {"swiglu_limit": 9.0}, "swiglu_limit=9.0"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 2}, "every second layer"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method"),
    ("deepseek_v2", {"q_lora_rank": None}, "26 or 27 layers"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
    ("deepseek_v3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "mscale"),
    ("ernie4_5_moe", {"moe_layer_end_index": 0}, "moe_layer_end_index=0"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, family, changes, message):
    save_tiny(tmp_path / "model", family)
    change_config(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=r".") as caught:
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


GATE = "model.layers.0.mlp.gate.weight"
MISPLACED = {
    "nameless tensors": ({"a.more": torch.zeros(1), "extra": torch.zeros(3)}, "a.more\n  extra"),
    "fp8": ({GATE: torch.zeros(5, 64, dtype=torch.float8_e4m3fn)}, "float8"),
    "bytes": ({GATE: torch.zeros(5, 64, dtype=torch.uint8)}, "uint8"),
    "blocks without scales": (
        {"model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(1, dtype=torch.uint8)},
        "down_proj_scales is missing",
    ),
    "scales without blocks": (
        {"model.layers.0.mlp.experts.down_proj_scales": torch.zeros(1, dtype=torch.uint8)},
        "down_proj_scales",
    ),
    "a missing expert": ({"model.layers.0.mlp.experts.4.up_proj.weight": None}, "[0, 1, 2, 3]"),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_tensors_that_have_no_place_are_refused(tmp_path, case):
    changes, message = MISPLACED[case]
    save_tiny(tmp_path / "model", "qwen3_moe")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(ValueError, match=r".") as caught:
        export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert message in str(caught.value)
    assert not (tmp_path / "model.gguf").exists()


def test_a_number_too_large_for_float16_is_refused_and_the_old_file_stays(tmp_path):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model.gguf"
    export_gguf(tmp_path / "model", file, dtype=torch.float16)
    before = file.read_bytes()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"lm_head.weight goes up to 1e\+05.*bfloat16"):
        export_gguf(tmp_path / "model", file, dtype=torch.float16)
    assert file.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.gguf"}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    save_tiny(tmp_path / "model", "qwen3_moe")
    file = tmp_path / "model.gguf"
    file.write_bytes(b"old")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(OSError, match="no space left on disk") as caught:
        export_gguf(tmp_path / "model", file)
    assert caught.value.errno == errno.ENOSPC
    assert file.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 2


def test_a_wrong_dtype_folder_or_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dtype=torch\.int8 must be torch\.float32"):
        export_gguf(tmp_path, tmp_path / "x.gguf", dtype=torch.int8)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        export_gguf(tmp_path, tmp_path / "x.gguf")
    save_tiny(tmp_path / "model", "qwen3_moe")
    with pytest.raises(IsADirectoryError, match="name of a file"):
        export_gguf(tmp_path / "model", tmp_path / "model")
