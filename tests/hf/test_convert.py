"""`sparse-moe convert`: runs, models and Hugging Face folders into one another; logits and tokens stay."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import transformers
from train_helpers import tiny_run

from moe import Decoder
from moe.cli import main
from moe.hf.convert import compare, convert, open_source, random_ids
from moe.hf.tokenizer_files import bytes_as_bpe, read_tokenizer
from moe.train.loop import train
from moe.train.runs import open_run
from moe.train.tokenizer import ByteTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
TEXT = "the same bytes, one further on: café\n"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def run(request, root):
    words = [] if request.param == "bytes" else ["data.tokenizer=bpe", "model.vocab_size=300"]
    train(tiny_run(root, *words), root / request.param, log=lambda line: None)
    return root / request.param


def sparse_moe(*words: object) -> int:
    return main([str(word) for word in words])


def test_a_run_becomes_a_folder_that_transformers_reads_and_continues_alike(run, tmp_path, capsys):
    assert sparse_moe("convert", run, tmp_path / "hub", "--verify") == 0
    printed = capsys.readouterr().out
    assert "(hub): glm4_moe" in printed and "verified against transformers" in printed
    opened = open_run(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hub")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == opened.tokenizer.encode(TEXT.encode()).tolist()
    assert tokenizer.decode(ids[0]) == TEXT
    assert tokenizer.eos_token_id == opened.tokenizer.end_of_text
    theirs = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(opened.model.generate(ids, max_new_tokens=24, temperature=0), theirs)


def test_there_and_back_is_the_same_run(run, root, tmp_path, capsys):
    assert sparse_moe("convert", run, tmp_path / "hub") == 0
    settings = (f"data.folder={root / 'text'}", f"data.cache={root / 'cache'}", "data.sequence_length=32")
    settings += ("train.steps=3", "train.batch_size=4")
    assert sparse_moe("convert", tmp_path / "hub", tmp_path / "back", "--verify", *settings) == 0
    assert "largest difference of logits" in capsys.readouterr().out
    before, after = open_run(run), open_run(tmp_path / "back")
    assert after.step == 0 and after.tokenizer.identity == before.tokenizer.identity
    expected = before.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in after.model.state_dict().items())
    assert sparse_moe("train", "--out", tmp_path / "back", "--resume", "--no-report") == 0
    assert open_run(tmp_path / "back").step == 3


def test_a_model_of_ours_comes_from_either_layout(run, tmp_path):
    expected = open_run(run).model.state_dict()
    for layout in ("hub", "packed"):
        convert(open_source(run), tmp_path / layout, layout)
        convert(open_source(tmp_path / layout), tmp_path / f"{layout} ours", "model")
        found = Decoder.from_pretrained(tmp_path / f"{layout} ours")
        assert found.origin is None
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())


def test_a_dtype_is_written_and_verified_in_it(run, tmp_path, capsys):
    assert sparse_moe("convert", run, tmp_path / "half", "--dtype", "bfloat16", "--verify") == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert Decoder.from_pretrained(tmp_path / "half").head_weight.dtype == torch.bfloat16


def test_a_difference_is_found_and_fails_the_command(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moe.hf.convert.compare", lambda *_, **__: 0.5)
    assert sparse_moe("convert", run, tmp_path / "hub", "--verify", "--ids", "5,17,3") == 1
    assert "on 3 ids" in capsys.readouterr().out


def test_compare_sees_one_changed_weight(run, tmp_path):
    source = open_source(run)
    convert(source, tmp_path / "hub", "hub")
    ids = random_ids(source.decoder)
    assert compare(source.decoder, tmp_path / "hub", ids) <= 1e-5
    with torch.no_grad():
        source.decoder.model.layers[1].mlp.experts.down_proj += 0.5
    assert compare(source.decoder, tmp_path / "hub", ids) > 1e-3


def test_bytes_are_a_byte_level_bpe_without_merges(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(bytes_as_bpe()))
    assert isinstance(read_tokenizer(tmp_path, 256), ByteTokenizer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    every = "".join(map(chr, [*range(0x20, 0x500), 0x20AC, 0x1F600])) + "\n\t\x00"
    assert theirs(every)["input_ids"] == list(every.encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(added_tokens=[]), "has no token <|endoftext|>"),
        (lambda data: data.update(pre_tokenizer=None, decoder=None), "no byte-level tokenizer"),
        (lambda data: data["model"]["vocab"].update({"aa": 255}), "has 257 tokens, more than vocab_size=256"),
    ],
)
def test_a_tokenizer_that_no_run_can_have_is_refused(change, message, tmp_path):
    data = bytes_as_bpe()
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError) as error:
        read_tokenizer(tmp_path, 256)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "run"], "is a run already"),
        (["--checkpoint", "step_00000099"], "no checkpoint 'step_00000099'"),
        (["data.folder=texts"], "needs --to run"),
        (["--to", "gguf", "--verify"], "transformers reads neither end"),
    ],
)
def test_what_cannot_be_converted_is_refused(run, words, message, tmp_path, capsys):
    assert sparse_moe("convert", run, tmp_path / "target", *words) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_written_over(run, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    assert sparse_moe("convert", run, tmp_path / "full") == 2
    assert "exists" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["letter.txt"]


def test_a_folder_without_a_tokenizer_is_no_run(run, tmp_path, capsys):
    convert(open_source(run), tmp_path / "hub", "hub")
    (tmp_path / "hub" / "tokenizer.json").unlink()
    assert sparse_moe("convert", tmp_path / "hub", tmp_path / "run") == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_run_becomes_a_file_for_llama_cpp(run, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    assert sparse_moe("convert", run, tmp_path / "model.gguf", "--to", "gguf") == 0
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = next(t for t in reader.tensors if t.name == "blk.1.ffn_down_exps.weight")
    expected = open_run(run).model.model.layers[1].mlp.experts.down_proj
    assert torch.equal(torch.from_numpy(stored.data.copy()).view(expected.shape), expected.detach())
