"""Models of this library in lm-eval (the language model evaluation harness); extra `[eval]`.

    sparse-moe eval RUN_FOLDER --lm-eval TASKS [--lm-eval-path FOLDER]

and in lm-eval itself, where it reads the entry points `lm_eval.models`, or once this module is imported:

    lm-eval run --model sparse_moe --model_args pretrained=RUN_FOLDER --tasks TASKS
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from moe.generate import SamplingOptions
from moe.probes.likelihood import Ids, Score, rolling_windows
from moe.probes.prober import DEFAULT_BATCH, open_prober

DEFAULT_NEW_TOKENS = 256  # lm-eval's own
SAMPLING = {"temperature", "top_k", "top_p", "min_p"}
GENERATION = {"until", "max_gen_toks", "do_sample", *SAMPLING}


class SparseMoELM(TemplateLM):
    """A run folder or a model folder as lm-eval asks it.

    pretrained   the folder
    checkpoint   of a run folder: step_00000400; default: the newest
    batch_size   windows at a time; "auto" is 8
    max_length   tokens read at most; default: the length of training; of a model folder,
                 max_position_embeddings

    Raises:
        FileNotFoundError: no model there.
        ValueError: a damaged file, a folder without its tokenizer, or a size below 1.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str],
        checkpoint: str | None = None,
        device: str | None = None,
        batch_size: int | str = DEFAULT_BATCH,
        max_length: int | None = None,
        max_batch_size: int | None = None,  # lm-eval gives it to every model
    ) -> None:
        super().__init__()
        batch = DEFAULT_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self.prober = open_prober(
            Path(pretrained), checkpoint=checkpoint, device=device, batch=batch, length=max_length
        )
        self._device = next(self.prober.model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The end of text: what a document begins after."""
        return self.prober.tokenizer.end_of_text

    @property
    def max_length(self) -> int:
        """How many tokens are read at most."""
        return self.prober.length

    @property
    def tokenizer_name(self) -> str:
        """A word that changes with the tokens."""
        return f"sparse_moe-{self.prober.tokenizer.identity}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """The ids of a text; nothing is added."""
        return self.prober.ids(string)

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """The text of ids."""
        return self.prober.text(tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding writes it.

        An empty context is the end of text before a document. Spaces at the end of a context belong to the
        continuation, as everywhere in lm-eval.
        """
        pairs = [self._pair(*_arguments(request)) for request in requests]
        scores = self.prober.score(pairs)
        return self._remember("loglikelihood", requests, [_pair_of(score) for score in scores])

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        if not context:
            return [self.eot_token_id], self.tok_encode(continuation)
        before, after = self._encode_pair(context, continuation)
        return before or [self.eot_token_id], after  # a context of spaces alone has moved over

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], Ids, Ids]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """As `loglikelihood`, for ids."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        return [_pair_of(score) for score in self.prober.score(pairs)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text from its beginning, in windows of `max_length`."""
        owners, pairs = [], []
        for owner, request in enumerate(requests):
            (text,) = _arguments(request)
            for window in rolling_windows(self.eot_token_id, self.tok_encode(text), self.max_length):
                owners.append(owner)
                pairs.append((window.ids[: -window.count], window.ids[-window.count :]))
        totals = [0.0] * len(requests)
        for owner, score in zip(owners, self.prober.score(pairs), strict=True):
            totals[owner] += score.log_probability
        return self._remember("loglikelihood_rolling", requests, totals)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first stop, which is left out.

        Raises:
            ValueError: a generation option that this model does not have.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(_arguments(request)[1]), []).append(index)
        texts: dict[int, str] = {}
        for members in groups.values():
            arguments = [_arguments(requests[i]) for i in members]
            stops, options = read_generation(arguments[0][1])
            contexts = [self.tok_encode(context) or [self.eot_token_id] for context, _ in arguments]
            written = self.prober.write(contexts, stops=stops, options=options)
            texts |= zip(members, written, strict=True)
        return self._remember("generate_until", requests, [texts[i] for i in range(len(requests))])

    def _remember(self, kind: str, requests: list[Instance], answers: list[Any]) -> list[Any]:
        """Give the answers to lm-eval's cache, if there is one."""
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


register_model("sparse_moe")(SparseMoELM)  # not as a decorator, behind which a type checker loses the class


def read_generation(options: Mapping[str, Any]) -> tuple[list[str], SamplingOptions]:
    """The stops and the sampling options in lm-eval's arguments of a generation; greedy unless they say else.

    Raises:
        ValueError: an option that is not known here.
    """
    unknown = sorted(options.keys() - GENERATION)
    if unknown:
        raise ValueError(f"generation options {unknown} are not known here; known: {sorted(GENERATION)}.")
    until = options.get("until") or []
    stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    sampling = {name: options[name] for name in SAMPLING if options.get(name) is not None}
    is_drawn = options.get("do_sample", bool(sampling.get("temperature")))
    if not is_drawn:
        sampling = {"temperature": 0.0}
    new = options.get("max_gen_toks", DEFAULT_NEW_TOKENS)
    return stops, cast(SamplingOptions, {"max_new_tokens": new, "seed": 0, **sampling})


def evaluate_tasks(
    model: SparseMoELM,
    tasks: Sequence[str],
    *,
    path: Path | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """The metrics of each task. `path`: a folder with tasks of one's own, as YAML files.

    Raises:
        ValueError: a task that does not exist, or an empty list.
    """
    if path is not None and not path.is_dir():
        raise ValueError(f"{path} is no folder; name the one that holds the YAML files of the tasks.")
    manager = _find_tasks(tasks, path)
    found = simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=1000,
        log_samples=False,
    )
    results = cast("dict[str, Any]", found)["results"]
    return {name: _numbers(metrics) for name, metrics in results.items()}


def _find_tasks(tasks: Sequence[str], path: Path | None) -> TaskManager:
    """A manager that knows all the tasks. The thousands of files of lm-eval are read if one is missing."""
    unknown, manager = list(tasks), None
    for own in (False, True) if path else (True,):
        if unknown:
            manager = TaskManager(include_path=str(path) if path else None, include_defaults=own)
            unknown = [task for task in tasks if not manager.match_tasks([task])]
    if manager is None or unknown:
        raise ValueError(
            f"lm-eval knows no task {', '.join(unknown) or '(none given)'}. `lm-eval ls tasks` lists them; "
            f"--lm-eval-path adds a folder with your own."
        )
    return manager


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that are finite numbers: lm-eval writes "N/A" for an error that it did not estimate."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _arguments(request: Instance) -> Any:
    return request.args


def _pair_of(score: Score) -> tuple[float, bool]:
    return score.log_probability, score.is_greedy
