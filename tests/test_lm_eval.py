"""lm-eval asks a run: the three kinds of request, and tasks from local files, with no network."""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import SENTENCE, tiny_run

pytest.importorskip("lm_eval")

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from moe.probes.likelihood import rolling_windows
from moe.probes.lm_eval import SparseMoELM, evaluate_tasks, read_generation
from moe.train.loop import train

WORDS = SENTENCE.split()


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def run(request, tmp_path_factory) -> Path:
    """A run of a few steps, on bytes and on byte-level BPE."""
    root = tmp_path_factory.mktemp(request.param)
    vocabulary = ["model.vocab_size=300"] if request.param == "bpe" else []
    train(tiny_run(root, f'data.tokenizer="{request.param}"', *vocabulary), root / "run")
    return root / "run"


@pytest.fixture(scope="module")
def model(run) -> SparseMoELM:
    return SparseMoELM(run, batch_size="3", max_length=64)


def ask(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i)  # type: ignore[arg-type]
        for i, one in enumerate(arguments)
    ]


def by_hand(model: SparseMoELM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Sum of log-softmax of the decoder's own logits over the continuation, and whether it is greedy."""
    with torch.no_grad():
        logits = model.prober.model(torch.tensor([context + continuation])).logits[0].double()
    chosen = logits[len(context) - 1 : -1]
    targets = torch.tensor(continuation)
    total = chosen.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return total, torch.equal(chosen.argmax(-1), targets)


# Requests


def test_loglikelihood_is_the_sum_of_the_decoders_log_probabilities(model):
    pairs = [
        ("the expert", " router"),
        ("", "sends"),
        ("é", "ü"),
        ("every token to two of", " many small layers"),
    ]
    answers = model.loglikelihood(ask("loglikelihood", *pairs))
    for (context, continuation), (total, greedy) in zip(pairs, answers, strict=True):
        before = model.tok_encode(context) if context else [model.eot_token_id]
        after = model.tok_encode(context + continuation)[len(before) if context else 0 :]
        expected, is_greedy = by_hand(model, before, after)
        assert total == pytest.approx(expected, abs=1e-4) and greedy == is_greedy


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(model):
    pairs = [("the expert ", "router"), ("the expert", " router"), ("  ", "a"), ("", "  a")]
    first, second, third, fourth = model.loglikelihood(ask("loglikelihood", *pairs))
    assert first == pytest.approx(second) and third == pytest.approx(fourth)


def test_the_greedy_flag_marks_what_the_model_writes_itself(model):
    context = model.tok_encode("the expert router")
    ids = model.prober.model.generate(torch.tensor([context]), max_new_tokens=4, temperature=0)[0].tolist()
    other = [*ids[:-1], (ids[-1] + 1) % 200]
    pairs = [(("", ""), context, whole[len(context) :]) for whole in (ids, other)]
    assert [greedy for _, greedy in model._loglikelihood_tokens(pairs)] == [True, False]


def test_loglikelihood_rolling_counts_every_token_once_in_lm_evals_windows(model):
    text = " ".join(WORDS * 12)
    ids = model.tok_encode(text)
    assert len(ids) > 2 * model.max_length
    (answer, short, nothing) = model.loglikelihood_rolling(
        ask("loglikelihood_rolling", (text,), ("the expert",), ("",))
    )
    expected = 0.0
    windows = list(utils.get_rolling_token_windows(ids, model.eot_token_id, model.max_length, 1))
    for window in windows:
        expected += by_hand(model, *utils.make_disjoint_window(window))[0]
    assert answer == pytest.approx(expected, rel=1e-5)
    assert short == pytest.approx(
        by_hand(model, [model.eot_token_id], model.tok_encode("the expert"))[0], abs=1e-4
    )
    assert nothing == 0


@pytest.mark.parametrize(("tokens", "length"), [(1, 4), (4, 4), (5, 4), (11, 4), (12, 4), (7, 1)])
def test_rolling_windows_are_those_of_lm_eval(tokens, length):
    ids = list(range(1, tokens + 1))
    theirs = [
        (context + continuation, len(continuation))
        for context, continuation in map(
            utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 0, length, 1)
        )
    ]
    assert [(window.ids, window.count) for window in rolling_windows(0, ids, length)] == theirs


def test_generate_until_stops_and_takes_each_requests_own_options(model):
    greedy = {"until": [], "max_gen_toks": 8}
    (whole,) = model.generate_until(ask("generate_until", ("the expert", greedy)))
    context = torch.tensor([model.tok_encode("the expert")])
    ids = model.prober.model.generate(context, max_new_tokens=8, temperature=0, stop=model.eot_token_id)[
        0, context.shape[1] :
    ]
    assert whole == model.tok_decode(ids.tolist()) and len(whole) > 2
    stop = {"until": whole[2], "max_gen_toks": 8}
    drawn = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    requests = ask("generate_until", ("the expert", stop), ("", drawn), ("the expert", greedy), ("", drawn))
    first, second, third, fourth = model.generate_until(requests)
    assert first == whole[: whole.index(whole[2])] and third == whole
    assert model.generate_until(requests) == [first, second, third, fourth]


@pytest.mark.parametrize(
    ("given", "stops", "options"),
    [
        ({}, [], {"max_new_tokens": 256, "temperature": 0.0, "seed": 0}),
        ({"until": "\n", "temperature": 0}, ["\n"], {"max_new_tokens": 256, "temperature": 0.0, "seed": 0}),
        ({"until": ["a", ""], "max_gen_toks": 3, "do_sample": False, "top_p": 0.5}, ["a"],
         {"max_new_tokens": 3, "temperature": 0.0, "seed": 0}),
        ({"temperature": 0.7, "top_k": 5}, [],
         {"max_new_tokens": 256, "temperature": 0.7, "top_k": 5, "seed": 0}),
        ({"do_sample": True}, [], {"max_new_tokens": 256, "seed": 0}),
    ],
)  # fmt: skip
def test_generation_is_greedy_unless_it_says_else(given, stops, options):
    assert read_generation(given) == (stops, options)


def test_an_unknown_generation_option_is_refused():
    with pytest.raises(ValueError, match="num_beams"):
        read_generation({"num_beams": 4})


def test_lm_eval_finds_the_model_by_its_name(run):
    found = get_model("sparse_moe").create_from_arg_string(
        f"pretrained={run},max_length=16", {"batch_size": 2, "device": "cpu", "max_batch_size": None}
    )
    assert isinstance(found, SparseMoELM) and found.max_length == 16 and found.prober.batch == 2


# Tasks, as a user runs them

QUESTIONS = [
    {"question": " ".join(WORDS[i : i + 3]), "choices": [WORDS[i + 3], WORDS[-i - 1]], "answer": 0}
    for i in range(6)
]
TASKS = {
    "which_word": """
        output_type: multiple_choice
        doc_to_text: "{{question}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: answer
        target_delimiter: " "
        metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
    """,
    "whole_text": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{question}}"
        metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
    """,
    "next_words": """
        output_type: generate_until
        doc_to_text: "{{question}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    """,
}


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with three tasks on one JSON file."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.json"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    for name, body in TASKS.items():
        head = (
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        )
        (folder / f"{name}.yaml").write_text(head + textwrap.dedent(body), encoding="utf-8")
    return folder


def sparse_moe(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, where no hub can be reached."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    environment = os.environ | offline | {"HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "moe", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_tasks_from_local_files_have_the_value_that_the_logits_give(run, model, tasks, tmp_path):
    done = sparse_moe(
        tmp_path, "eval", run, "--lm-eval", "which_word,whole_text,next_words", "--lm-eval-path", tasks
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "lm_eval.json").read_text())
    assert found.keys() == TASKS.keys() and "which_word" in done.stdout

    right, nats, size = 0, 0.0, 0
    for question in QUESTIONS:
        context = model.tok_encode(question["question"])
        scores = [
            by_hand(model, context, model.tok_encode(f"{question['question']} {choice}")[len(context) :])[0]
            for choice in question["choices"]
        ]
        right += scores[0] > scores[1]
        nats += by_hand(model, [model.eot_token_id], context)[0]
        size += len(question["question"].encode())
    assert found["which_word"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert found["whole_text"]["bits_per_byte,none"] == pytest.approx(-nats / size / math.log(2), rel=1e-5)
    assert found["next_words"]["exact_match,none"] == 0


def test_tasks_that_do_not_exist_are_refused(tasks):
    model: Any = None  # refused before it is asked
    with pytest.raises(ValueError, match="knows no task no_such_task"):
        evaluate_tasks(model, ["which_word", "no_such_task"], path=tasks)
    with pytest.raises(ValueError, match="none given"):
        evaluate_tasks(model, [])
    with pytest.raises(ValueError, match="nowhere is no folder"):
        evaluate_tasks(model, ["which_word"], path=Path("nowhere"))
