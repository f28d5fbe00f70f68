"""The figure of a run is made from its folder alone, and has something to see in it."""

import json

import pytest
from train_helpers import tiny_run

from moe.train.loop import train
from moe.train.run_folder import RunFolder
from moe.train.runs import evaluate_run, open_run

pytest.importorskip("matplotlib")

import matplotlib.image

from moe.report.figures import draw_run


@pytest.mark.parametrize("dense", [False, True], ids=["moe", "dense"])
def test_a_figure_is_drawn_and_drawn_again(tmp_path, dense):
    more = ("model.num_experts=0", "model.intermediate_size=32") if dense else ()
    train(tiny_run(tmp_path, *more), tmp_path / "run")
    path = draw_run(tmp_path / "run")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1200
    assert len({tuple(pixel) for pixel in (pixels[::8, ::8, :3] * 255).astype(int).reshape(-1, 3)}) > 20
    evaluate_run(open_run(tmp_path / "run"))
    before = path.read_bytes()
    assert draw_run(tmp_path / "run").read_bytes() != before  # now with gzip and xz


def test_one_interval_is_enough(tmp_path):
    train(tiny_run(tmp_path, "train.steps=1"), tmp_path / "run")
    assert draw_run(tmp_path / "run").exists()


def test_a_folder_without_a_run_or_without_steps_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        draw_run(tmp_path)
    run = RunFolder(tmp_path / "run")
    run.start(tiny_run(tmp_path))
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_run(run.path)


def test_the_figure_reads_records_that_json_wrote(tmp_path):
    train(tiny_run(tmp_path), tmp_path / "run")
    records = RunFolder(tmp_path / "run").read_metrics()
    assert json.loads(json.dumps(records)) == records
