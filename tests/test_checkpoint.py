"""Folders that are the old one or the new one, and weights that are refused unless they fit."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import moe.atomic
import moe.checkpoint
from moe.atomic import atomic_folder, readable_folder, write_atomically
from moe.checkpoint import load_tensors, save_tensors
from moe.decoder import Decoder
from moe.decoder_config import DecoderConfig

SIZES = {
    "vocab_size": 13,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}


def decoder(seed: int = 0, **changes) -> Decoder:
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig(**(SIZES | changes)))
    for buffer in model.buffers():
        torch.nn.init.normal_(buffer)
    return model


@pytest.fixture
def saved(tmp_path) -> Path:
    decoder().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path) -> Path:
    decoder().save_pretrained(tmp_path / "model", max_shard_bytes=4000)
    return tmp_path / "model"


def equal(one: Decoder, other: Decoder) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Round trips


@pytest.mark.parametrize("max_shard_bytes", [5e9, 4000, 1])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tied, max_shard_bytes):
    model = decoder(tie_word_embeddings=tied, use_selection_bias=True, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "m", max_shard_bytes=max_shard_bytes)
    again = Decoder.from_pretrained(tmp_path / "m")
    assert again.config == model.config and equal(again, model)
    assert not again.training and all(parameter.requires_grad for parameter in again.parameters())
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_tied_weights_are_stored_once(saved):
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")


def test_shards_hold_at_most_the_bytes_asked_and_the_index_says_which(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 4000
        assert all(index["weight_map"][name] == shard.name for name in tensors)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in decoder().state_dict().values())


def test_the_config_is_json_with_hugging_face_keys(saved):
    data = json.loads((saved / "config.json").read_text())
    assert data["model_type"] == "sparse_moe" and data["num_experts_per_tok"] == 2


def test_dtype_is_kept_or_changed_on_request(saved, tmp_path):
    half = Decoder.from_pretrained(saved, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = Decoder.from_pretrained(tmp_path / "half")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16} and equal(again, half)


def test_loading_draws_no_random_numbers_and_lets_go_of_the_file(saved):
    state = torch.get_rng_state()
    model = Decoder.from_pretrained(saved)
    (saved / "model.safetensors").write_bytes(b"\0" * (saved / "model.safetensors").stat().st_size)
    assert equal(model, decoder())
    torch.set_rng_state(state)
    shutil.rmtree(saved)


def test_saving_again_replaces_the_model_and_keeps_other_files(sharded):
    (sharded / "tokenizer.json").write_text("{}")
    decoder(1).save_pretrained(sharded)
    assert names(sharded) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert equal(Decoder.from_pretrained(sharded), decoder(1))


def test_saving_into_a_folder_with_subfolders_is_refused_and_changes_nothing(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoints"):
        decoder().save_pretrained(tmp_path / "run")
    assert names(tmp_path) == ["run"] and names(tmp_path / "run") == ["checkpoints"]


def test_files_are_as_readable_as_the_folder(saved):
    folder, file = saved.stat().st_mode & 0o666, (saved / "model.safetensors").stat().st_mode & 0o666
    assert file == folder & 0o666


# What is refused


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_all_tensors_that_do_not_fit_are_listed_at_once(saved):
    def damage(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.0.mlp.experts.down_proj"]
        tensors["surplus"] = torch.zeros(2)
        tensors["model.embed_tokens.weight"] = torch.zeros(13, 15)

    rewrite(saved, damage)
    with pytest.raises(ValueError) as error:
        Decoder.from_pretrained(saved)
    lines = str(error.value).splitlines()
    assert "missing: model.norm.weight (16)" in lines[1] + lines[2]
    assert "missing: model.layers.0.mlp.experts.down_proj (4 16 8)" in lines[1] + lines[2]
    assert lines[3:] == [
        "  unexpected: surplus (2)",
        "  wrong shape: model.embed_tokens.weight is (13 15), the model has (13 16)",
    ]


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_named(saved, keep):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        Decoder.from_pretrained(saved)


def test_a_pickle_is_not_read(saved):
    torch.save({"a": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Decoder.from_pretrained(saved)
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="can run code"):
        Decoder.from_pretrained(saved)


@pytest.mark.parametrize("how", ["..", "absolute", "link"])
def test_an_index_that_leads_outside_is_refused(sharded, how):
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    _name, shard = next(iter(data["weight_map"].items()))
    outside = sharded.parent / "outside.safetensors"
    shutil.copy(sharded / shard, outside)
    if how == "link":
        (sharded / shard).unlink()
        (sharded / shard).symlink_to(outside)
    else:
        escape = "../outside.safetensors" if how == ".." else str(outside)
        data["weight_map"] |= {key: escape for key, value in data["weight_map"].items() if value == shard}
        index.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="outside the folder"):
        Decoder.from_pretrained(sharded)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\ud800"], ids=repr
)
def test_an_index_that_is_none_is_refused(sharded, text):
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"index\.json"):
        Decoder.from_pretrained(sharded)


def test_an_index_that_promises_too_much_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["ghost"] = next(iter(data["weight_map"].values()))
    index.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="do not hold: ghost"):
        Decoder.from_pretrained(sharded)


def test_what_is_missing_is_named(sharded, tmp_path):
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        Decoder.from_pretrained(tmp_path / "nowhere")
    next(sharded.glob("model-00002*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002"):
        Decoder.from_pretrained(sharded)
    (sharded / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        Decoder.from_pretrained(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_expert": 4}, "Did you mean 'num_experts'"),
        ({"model_type": "mixtral"}, "mixtral"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
    ],
    ids=["unknown key", "another model", "nonsense value"],
)
def test_a_config_that_does_not_fit_is_refused(saved, change, message):
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message) as error:
        Decoder.from_pretrained(saved)
    assert "config.json" in str(error.value)


def test_a_shard_size_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        decoder().save_pretrained(tmp_path / "m", max_shard_bytes=0)
    assert names(tmp_path) == []


# Old or new, whatever happens


def rust_error(*args):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def python_error(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("raises", [rust_error, python_error])
@pytest.mark.parametrize("where", ["save_file", "write_json", "_sync"])
def test_a_full_disk_leaves_the_old_model_and_nothing_else(saved, monkeypatch, where, raises):
    module = moe.atomic if where == "_sync" else moe.checkpoint
    monkeypatch.setattr(module, where, raises)
    with pytest.raises(OSError, match=r"no space left on disk while saving .*model") as error:
        decoder(1).save_pretrained(saved)
    assert error.value.errno == errno.ENOSPC
    assert names(saved.parent) == ["model"] and equal(Decoder.from_pretrained(saved), decoder())


def test_any_error_while_writing_leaves_the_old_folder(saved):
    with pytest.raises(KeyboardInterrupt), atomic_folder(saved) as temporary:
        (temporary / "half").write_text("x")
        raise KeyboardInterrupt
    assert names(saved.parent) == ["model"] and equal(Decoder.from_pretrained(saved), decoder())


def test_a_failed_second_rename_puts_the_old_folder_back(saved, monkeypatch):
    rename = Path.rename

    def fail(self, target):
        if ".tmp-" in self.name and Path(target).name == "model":
            raise OSError(errno.EIO, "bad disk")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="bad disk"):
        decoder(1).save_pretrained(saved)
    monkeypatch.undo()
    assert names(saved.parent) == ["model"] and equal(Decoder.from_pretrained(saved), decoder())


class Killed(BaseException):
    """A process that stops at once: nothing after it runs."""


def system_calls(folder: Path, monkeypatch, stop_at: int) -> int:
    """Save `decoder(1)`; freeze the disk from call number `stop_at` on. How many calls there were."""
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > stop_at:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(Path, "mkdir", counted(Path.mkdir))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(moe.checkpoint, "save_file", counted(save_file))
        with contextlib.suppress(Killed):
            decoder(1).save_pretrained(folder)
    return calls


def test_a_death_between_any_two_system_calls_leaves_the_old_or_the_new_model(saved, monkeypatch, tmp_path):
    steps = system_calls(shutil.copytree(saved, tmp_path / "count"), monkeypatch, 10**9)
    seen = set()
    for stop_at in range(steps + 1):
        folder = shutil.copytree(saved, tmp_path / f"at {stop_at} [a]")
        system_calls(folder, monkeypatch, stop_at)
        found = Decoder.from_pretrained(folder)
        is_old, is_new = equal(found, decoder()), equal(found, decoder(1))
        assert is_old != is_new, stop_at
        seen.add((is_old, folder.exists()))
        decoder(2).save_pretrained(folder)  # the next writer cleans up
        assert equal(Decoder.from_pretrained(folder), decoder(2))
        assert [name for name in names(tmp_path) if name.startswith(".")] == []
    assert seen == {(True, True), (True, False), (False, True)}


def test_an_old_folder_that_is_half_removed_is_never_taken_for_a_model(saved, monkeypatch):
    def die_half_way(folder, **_):
        (Path(folder) / "config.json").unlink(missing_ok=True)
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", die_half_way)
    with pytest.raises(Killed):
        decoder(1).save_pretrained(saved)
    monkeypatch.undo()
    assert equal(Decoder.from_pretrained(saved), decoder(1))
    assert ".model.previous" not in names(saved.parent)


SAVER = """
    import itertools, sys, torch
    from moe.decoder_config import DecoderConfig
    from moe.decoder import Decoder
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Decoder(DecoderConfig({sizes})))
    for turn in itertools.count():
        models[turn % 2].save_pretrained(sys.argv[1], max_shard_bytes=4000)
        print(turn, flush=True)
"""


def test_kill_9_while_saving_leaves_a_complete_model(tmp_path):
    folder = tmp_path / "model"
    script = textwrap.dedent(SAVER).format(sizes=", ".join(f"{k}={v}" for k, v in SIZES.items()))
    for wait in (0.0, 0.013):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "0\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = Decoder.from_pretrained(folder)
        assert equal(found, decoder()) or equal(found, decoder(1))
    decoder(2).save_pretrained(folder)
    assert names(tmp_path) == ["model"] and equal(Decoder.from_pretrained(folder), decoder(2))


def test_a_link_is_followed_and_stays_a_link(saved):
    link = saved.parent / "latest"
    link.symlink_to(saved)
    decoder(1).save_pretrained(link)
    assert link.is_symlink() and equal(Decoder.from_pretrained(saved), decoder(1))


def test_a_file_is_not_overwritten_by_a_folder(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(NotADirectoryError, match="model is a file"):
        decoder().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_write_atomically_makes_parents_and_replaces_everything(tmp_path):
    target = tmp_path / "a" / "b"
    write_atomically(target, lambda folder: (folder / "one").write_text("1"))
    write_atomically(target, lambda folder: (folder / "two").write_text("2"))
    assert names(target) == ["two"] and readable_folder(target) == target and names(target.parent) == ["b"]


def test_tensors_of_any_name_layout_and_dtype_survive(tmp_path):
    tensors = {
        "transposed": torch.randn(3, 4).T,
        "half": torch.randn(5).bfloat16(),
        "step": torch.tensor(7),
        "none": torch.zeros(0, 3),
    }
    save_tensors(tmp_path, tensors, name="optimizer")
    found = load_tensors(tmp_path, name="optimizer")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors) and len(found) == 4
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_tensors(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"a is in two files, model-00001.* and model-00002"):
        load_tensors(tmp_path)


def test_the_current_folder_cannot_be_replaced_under_our_feet(tmp_path, monkeypatch):
    inside = tmp_path / "model" / "deep"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    with pytest.raises(ValueError, match="current folder"), atomic_folder(tmp_path / "model"):
        pass
    assert inside.exists()


def test_an_empty_folder_does_not_hide_or_cost_the_stranded_old_one(tmp_path):
    target, previous = tmp_path / "m", tmp_path / ".m.previous"
    write_atomically(target, lambda folder: (folder / "x").write_text("old"))
    target.rename(previous)  # as a writer killed between the two renames leaves it
    target.mkdir()
    assert (readable_folder(target) / "x").read_text() == "old"
    with pytest.raises(ZeroDivisionError):
        write_atomically(target, lambda folder: 1 / 0)
    assert (readable_folder(target) / "x").read_text() == "old"
