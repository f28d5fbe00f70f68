"""Where is a function defined? Asked over a whole package, which stands in the context."""

import importlib.util
from pathlib import Path

from moe.prefill import Progress
from moe.probes.needle.ask import ask, unwatched
from moe.probes.needle.codebase import build_codebase
from moe.probes.needle.evaluate import check_memory, check_model
from moe.probes.needle.haystack import Haystack
from moe.probes.needle.needles import DEFINITION
from moe.probes.needle.pooling import Result, facts_of_package, make_row
from moe.probes.needle.questions import Questions, trained_digests
from moe.probes.needle.record import NeedleRow
from moe.train.runs import Run


def evaluate_code(
    run: Run,
    questions: Questions,
    package: Path,
    *,
    progress: Progress = unwatched,
    answered: Progress = unwatched,
) -> NeedleRow:
    """ "Where is function F defined?" for `questions.queries` functions; the answer is the path of its file.

    Of the questions, only `queries`, `seed`, `dtype` and `batch` count: there is one haystack, the package.

    Raises:
        ValueError: the run was not trained on the template `definition`; as `check_model`, `check_memory`
            and `build_codebase`.
    """
    haystack = _build(run, questions, package)
    length = len(haystack.ids)
    with run.autocast():
        asked = ask(
            run.model,
            haystack,
            dtype=questions.dtype,
            batch=questions.batch,
            progress=progress,
            answered=answered,
        )
    result = Result.of(haystack, facts_of_package(package, haystack), asked)
    return make_row(run, [result], length=length, template=DEFINITION.name, dtype=questions.dtype)


def check_code(run: Run, questions: Questions, package: Path) -> None:
    """Refuse what cannot be measured, before anything is read; raises as `evaluate_code`."""
    _build(run, questions, package)


def _build(run: Run, questions: Questions, package: Path) -> Haystack:
    check_model(run, questions.dtype)
    needle = run.config.needle
    if needle is None or DEFINITION.name not in needle.templates:
        raise ValueError(
            f"{run.folder} was not trained on the template {DEFINITION.name!r}. "
            f"Train the variant code: sparse-moe needle train --variant code."
        )
    haystack = build_codebase(
        package, queries=questions.queries, seed=questions.seed, exclude_digests=trained_digests(run)
    )
    check_memory(run, questions.dtype, [len(haystack.ids)])
    return haystack


def find_package(name: str) -> Path:
    """The folder of an installed package, by its import name; or the folder that `name` is.

    Raises:
        ValueError: there is no such package or folder.
    """
    if name and Path(name).is_dir():
        return Path(name).absolute()
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"{name!r} is no installed package that has a folder, and no folder. "
            f"Install it, or give the path of a folder with Python source."
        )
    return Path(next(iter(found.submodule_search_locations)))
