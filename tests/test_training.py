"""A run learns, counts what it does, and stops when numbers stop being numbers."""

import errno
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from train_helpers import tiny_run

from moe.train import loop as loop_module
from moe.train import trainer as trainer_module
from moe.train.data import Windows
from moe.train.evaluate import compressors, evaluate, evaluated_text
from moe.train.header import estimate_memory
from moe.train.loop import train
from moe.train.metrics import NonFiniteError, count, describe_loads, duration
from moe.train.run_folder import RunFolder
from moe.train.runs import evaluate_run, held_out_excerpt, open_run, sample_text
from moe.train.tokenizer import ByteTokenizer
from moe.train.tokens import load_tokens
from moe.train.trainer import Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 40 steps, with the lines it logged."""
    root = tmp_path_factory.mktemp("finished")
    lines: list[str] = []
    result = train(tiny_run(root, "train.steps=40"), root / "run", log=lines.append)
    return result, lines, RunFolder(root / "run")


def make_trainer(root, *more) -> Trainer:
    config = tiny_run(root, *more)
    return Trainer(config, Windows(load_tokens(config).train, config.data.sequence_length))


def test_the_loss_goes_down(finished):
    losses = [record["cross_entropy"] for record in finished[2].read_metrics("train")]
    assert losses[-1] < 0.75 * losses[0]
    validation = [record["loss"] for record in finished[2].read_metrics("eval")]
    assert validation[-1] < validation[0]


def test_the_run_folder_is_complete(finished):
    result, _, run = finished
    names = {path.name for path in run.path.iterdir()}
    assert names == {"run_config.json", "env.json", "corpus.json", "metrics.jsonl", "checkpoints", ".lock"}
    files = {path.name for path in result.checkpoint.iterdir()}
    assert files == {"config.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert [path.name for path in run.checkpoints()] == ["step_00000030", "step_00000040"]


def test_a_line_is_printed_for_each_interval_in_one_shape(finished):
    lines = [line for line in finished[1] if line.startswith("step") and "validation" not in line]
    assert len(lines) == 8
    for line in lines:
        parts = [part.split()[0] for part in line.split(" | ")]
        assert parts[:6] == ["step", "loss", "bpb", "aux", "util", "lr"] and parts[-1] == "eta"
        assert "dead" in line and "tok/s mfu" in line and line.endswith("s")


def test_parameters_and_cost_are_told_before_the_first_step(finished):
    first_step = next(i for i, line in enumerate(finished[1]) if line.startswith("step"))
    text = "\n".join(finished[1][:first_step])
    for words in (
        "parameters in total",
        "active a token",
        "without embeddings",
        "FLOP forward",
        "epochs",
        "GB",
        "backend",
    ):
        assert words in text


def test_loads_of_an_interval_add_up(finished):
    for record in finished[2].read_metrics("train"):
        for layer in record["load"]:
            assert np.mean(layer) == pytest.approx(1, abs=1e-3)
        assert record["dropped"] == 0 and record["dead"] == sum(
            x == 0 for layer in record["load"] for x in layer
        )


def test_the_opened_run_is_the_trained_model(finished):
    result, _, run = finished
    opened = open_run(run.path)
    assert opened.step == 40
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, opened.model.state_dict()[name])
    assert open_run(run.path, checkpoint="step_00000030").step == 30
    with pytest.raises(FileNotFoundError, match="step_00000040"):
        open_run(run.path, checkpoint="step_00000007")


def test_the_evaluation_is_written_beside_compressors_of_the_same_bytes(finished):
    run = open_run(finished[2].path)
    record = evaluate_run(run)
    assert json.loads((run.folder / "eval.json").read_text()) == record
    tokens = load_tokens(run.config)
    text = evaluated_text(
        Windows(tokens.validation, 32), tokens.tokenizer, run.config.train.final_eval_tokens
    )
    assert len(text) == record["bytes"] and compressors(text).items() <= record.items()
    assert record["bits_per_byte"] == pytest.approx(
        record["loss"] / np.log(2) * record["tokens"] / record["bytes"]
    )


def test_a_sample_is_text_and_repeats_with_its_seed(finished):
    run = open_run(finished[2].path)
    once, again = (sample_text(run, "the ", tokens=20, seed=1) for _ in range(2))
    assert once == again and once.startswith("the ") and len(once) > 4
    assert isinstance(sample_text(run, tokens=5), str)


def test_a_uniform_model_needs_eight_bits_a_byte_and_pays_for_ends_of_text(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight.zero_()
    windows = Windows(np.array([65, 66, 255, 67] * 33, np.uint8), 32)
    result = evaluate(trainer.model, windows, ByteTokenizer(), max_tokens=10**6)
    assert result.loss == pytest.approx(np.log(256)) and result.bytes == 3 * result.tokens / 4
    assert result.bits_per_byte == pytest.approx(8 * 4 / 3)


def test_a_small_evaluation_is_spread_over_the_large_one(tmp_path):
    trainer = make_trainer(tmp_path)
    windows = trainer.task.windows
    few = evaluate(trainer.model, windows, ByteTokenizer(), max_tokens=64, spread_over=32 * 8)
    each = [
        trainer.model.loss(*windows.take(np.array([i]))).cross_entropy.item()
        for i in (0, 4)  # two windows of eight
    ]
    assert few.loss == pytest.approx(np.mean(each), rel=1e-5) and few.tokens == 64


def test_a_sample_looks_no_further_back_than_training_did(finished, monkeypatch):
    run = open_run(finished[2].path)
    lengths = []

    def generate(ids, max_new_tokens, **options):
        lengths.append(ids.shape[1] + max_new_tokens)
        return torch.cat([ids, torch.full((1, max_new_tokens), ord("x"))], 1)

    monkeypatch.setattr(run.model, "generate", generate)
    assert sample_text(run, "the " * 20, tokens=70) == "the " * 20 + "x" * 70
    assert max(lengths) == run.config.data.sequence_length


def test_a_held_out_excerpt_is_validation_text(finished):
    run = open_run(finished[2].path)
    excerpt = held_out_excerpt(run, tokens=500)
    assert excerpt.encode() in bytes(load_tokens(run.config).validation) and excerpt.endswith("\n")
    assert held_out_excerpt(run, tokens=3)


def test_accumulation_changes_memory_and_not_the_step(tmp_path):
    whole, parts = make_trainer(tmp_path), make_trainer(tmp_path, "train.accumulation=4")
    whole.step(), parts.step()
    assert torch.equal(whole.meter.loads, parts.meter.loads)
    for ours, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    biases = [router.e_score_correction_bias for router in (*whole.routers, *parts.routers)]
    assert torch.equal(torch.stack(biases[:2]), torch.stack(biases[2:]))


def test_the_selection_bias_moves_once_a_step_towards_idle_experts(tmp_path):
    trainer = make_trainer(tmp_path, "optim.selection_bias_rate=0.5", "train.accumulation=2")
    trainer.step()
    for router, load in zip(trainer.routers, trainer.meter.loads, strict=True):
        step = 0.5 * torch.sign(load.double().mean() - load)
        torch.testing.assert_close(router.e_score_correction_bias.double(), step - step.mean())


def test_a_step_needs_no_float64_which_an_apple_gpu_lacks(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(torch.Tensor, "double", None)
    trainer.step()


def test_gradients_are_clipped_to_the_limit(tmp_path):
    trainer = make_trainer(tmp_path, "optim.clip=1e-3", "optim.lr=0.0")
    trainer.optimizer.step = lambda: norms.append(  # pyright: ignore[reportAttributeAccessIssue]
        torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm().item()
    )
    norms: list[float] = []
    trainer.step()
    assert norms[0] <= 1.001e-3


def test_a_dense_model_trains_too(tmp_path):
    config = tiny_run(tmp_path, "model.num_experts=0", "model.intermediate_size=64", "train.steps=5")
    lines: list[str] = []
    train(config, tmp_path / "run", log=lines.append)
    assert any("util n/a" in line for line in lines)


def test_auxiliary_losses_are_in_the_total(tmp_path):
    trainer = make_trainer(tmp_path, "model.router_aux_loss_coef=0.5", "model.router_z_loss_coef=0.25")
    trainer.step()
    record = trainer.meter.read()
    expected = record["cross_entropy"] + 0.5 * record["balance"] + 0.25 * record["z"]
    assert record["loss"] == pytest.approx(expected) and record["balance"] > 0 and record["z"] > 0


def test_bfloat16_on_a_cpu_learns_the_same(tmp_path):
    results = []
    for precision in ("float32", "bfloat16"):
        trainer = make_trainer(tmp_path, f"train.precision={precision}")
        for _ in range(6):
            trainer.step()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        results.append(trainer.meter.read()["cross_entropy"])
    assert results[1] == pytest.approx(results[0], rel=0.02)


def poison(trainer: Trainer, layer: int) -> None:
    with torch.no_grad():
        trainer.model.get_submodule(f"model.layers.{layer}.mlp.router").weight.fill_(float("nan"))  # pyright: ignore


@pytest.mark.parametrize("layer", [0, 1])
def test_router_logits_that_are_not_finite_stop_the_step_and_name_the_layer(tmp_path, layer):
    trainer = make_trainer(tmp_path)
    trainer.step()
    poison(trainer, layer)
    with pytest.raises(
        NonFiniteError, match=f"step 2: the router logits of layer {layer} became NaN or infinite"
    ):
        trainer.step()


def test_a_layer_number_counts_dense_layers(tmp_path):
    trainer = make_trainer(tmp_path, "model.first_k_dense_replace=1", "model.intermediate_size=32")
    poison(trainer, 1)
    with pytest.raises(NonFiniteError, match="step 1: the router logits of layer 1"):
        trainer.step()


def test_a_loss_that_is_not_finite_is_named_too(tmp_path):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="step 1: the loss became"):
        trainer.step()


def test_after_a_nan_the_last_good_checkpoint_is_kept_and_named(tmp_path, monkeypatch):
    class Breaking(Trainer):
        def step(self) -> None:
            if self.progress.step == 11:
                poison(self, 0)
            super().step()

    monkeypatch.setattr(loop_module, "Trainer", Breaking)
    with pytest.raises(
        NonFiniteError, match=r"step 12: .* layer 0 .*last good checkpoint is .*step_00000010.*optim\.lr"
    ):
        train(tiny_run(tmp_path), tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in run.checkpoints()] == ["step_00000010"]
    assert all(torch.isfinite(t).all() for t in open_run(run.path).model.state_dict().values())


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.model.norm.weight.register_hook(lambda grad: grad * float("inf"))
    before = trainer.model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(NonFiniteError, match="step 1: the gradient norm became"):
        trainer.step()
    assert torch.equal(trainer.model.model.embed_tokens.weight, before)


@pytest.mark.parametrize("steps", [1, 12], ids=["last step", "middle"])
def test_a_step_that_ruins_the_weights_fails_and_is_never_saved(tmp_path, steps):
    config = tiny_run(
        tmp_path,
        f"train.steps={steps}",
        "optim.lr=1e38",
        *("optim.warmup_steps=0", "train.log_every=1", "train.checkpoint_every=1", "train.eval_every=0"),
    )
    with pytest.raises(NonFiniteError, match=r"step 1: the validation loss became .*no checkpoint yet"):
        train(config, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    assert not run.checkpoints()
    assert not {"NaN", "Infinity"} & set(run.metrics_file.read_text().replace(",", " ").split())


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.step()
    with torch.no_grad():
        trainer.model.model.embed_tokens.weight[1, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"embed_tokens\.weight became NaN"):
        trainer.save(RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_metrics_hold_no_number_that_json_lacks(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        RunFolder(tmp_path).append_metrics({"loss": float("nan")})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_memory_estimate_counts_in_the_dtype_of_the_run(tmp_path):
    config = tiny_run(tmp_path)
    activations = [
        estimate_memory(config, 0, dtype) for dtype in (torch.float32, torch.bfloat16)
    ]  # without parameters
    assert activations[0] == 2 * activations[1] > 0


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save = trainer_module.RunFolder.save_checkpoint

    def full_after_ten(run, model, tensors, progress, keep):
        if progress.step <= 10:
            return save(run, model, tensors, progress, keep)
        monkeypatch.setattr("moe.train.run_folder.save_tensors", raise_full)
        return save(run, model, tensors, progress, keep)

    def raise_full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer_module.RunFolder, "save_checkpoint", full_after_ten)
    config = tiny_run(tmp_path)
    with pytest.raises(OSError, match="no space left on disk"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    run = RunFolder(tmp_path / "run")
    assert [path.name for path in run.checkpoints_folder.iterdir()] == ["step_00000010"]
    assert train(config, run.path, resume=True).checkpoint.name == "step_00000012"


@pytest.mark.parametrize(("place", "name"), [("run", "--out"), ("cache", r"data\.cache")])
def test_a_folder_to_write_into_inside_the_text_is_refused_before_anything_is_written(tmp_path, place, name):
    places = {"run": tmp_path / "run", "cache": tmp_path / "cache", place: tmp_path / "text" / "deep"}
    config = tiny_run(tmp_path, f'data.cache="{places["cache"]}"')
    with pytest.raises(ValueError, match=rf"{name}=.*deep' is inside data\.folder=.*outside it with {name}"):
        train(config, places["run"])
    assert not any(path.exists() for path in places.values())


def test_a_hidden_folder_inside_the_text_is_no_text(tmp_path):
    config = tiny_run(tmp_path, f'data.cache="{tmp_path / "text" / ".cache"}"', "train.steps=1")
    train(config, tmp_path / "text" / ".runs" / "first")
    assert train(config, tmp_path / "run").corpus.manifest["train"]["files"] < 12


def test_a_device_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    for device in ("cuda:77", "abacus"):
        with pytest.raises(ValueError, match=device):
            train(tiny_run(tmp_path, f'train.device="{device}"'), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(tmp_path):
    config = tiny_run(tmp_path, "train.device=cpu", "train.backend=triton")
    with pytest.raises(ValueError, match="Triton needs a GPU"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    train(tiny_run(tmp_path, "train.tensorboard=true", "train.steps=5"), tmp_path / "run")
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert b"train/cross_entropy" in file.read_bytes()


def test_compiled_training_takes_the_same_step(tmp_path):
    plain, compiled = make_trainer(tmp_path), make_trainer(tmp_path)
    compiled.loss = torch.compile(compiled.task.loss, backend="aot_eager")
    plain.step(), compiled.step()
    assert compiled.meter.read()["loss"] == pytest.approx(plain.meter.read()["loss"], rel=1e-5)


def test_loads_describe_dead_and_busy_experts():
    described = describe_loads(torch.tensor([[6, 2, 0, 0], [2, 2, 2, 2]]), torch.tensor(12))
    assert described["load"] == [[3.0, 1.0, 0.0, 0.0], [1.0] * 4]
    assert (
        described["dead"] == 2 and described["dropped"] == 0.25 and described["max_violation"] == [2.0, 0.0]
    )


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (12_345, "12.3k"), (4.5e6, "4.5M"), (7e13, "70T"), (0, "0")]
)
def test_counts_have_three_digits(number, text):
    assert count(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5s"), (252, "4m12s"), (3661, "1h01m")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_equal_seeds_make_equal_models(tmp_path):
    first, second, other = (
        make_trainer(tmp_path),
        make_trainer(tmp_path),
        make_trainer(tmp_path, "train.seed=1"),
    )
    weights = [trainer.model.model.embed_tokens.weight for trainer in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert replace(first.config.train, seed=1) == other.config.train
