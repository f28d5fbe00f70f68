"""What is asked of a run about every sense, of haystacks with nothing in them that it was trained on."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from moe.modality_config import ModalityConfig
from moe.probes.needle.haystack_text import HaystackText
from moe.probes.needle.questions import Questions
from moe.probes.senses.bank import Bank, build_bank
from moe.probes.senses.config import NAMES, SensesConfig, check_modalities
from moe.probes.senses.haystack import SensesHaystack, build_senses_haystack
from moe.train.runs import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class SensesQuestions(Questions):
    """`Questions` whose `templates` are modalities. `video`: a file whose frames are filler, too.

    Raises:
        ValueError: as `Questions`, or modalities that do not exist.
    """

    templates: tuple[str, ...] = tuple(NAMES)
    video: Path | None = None

    def __post_init__(self) -> None:
        Questions.__post_init__(self)
        check_modalities(self.templates, "modalities")

    def bank(self, run: Run) -> Bank:
        """Held-out images, recordings or tones, and noise.

        Raises:
            ImportError, FileNotFoundError, ValueError: as `build_bank` and `check_senses_run`.
        """
        senses, modalities = check_senses_run(run)
        return _bank(senses, modalities, self.seed, self.video)


def check_senses_run(run: Run) -> tuple[SensesConfig, ModalityConfig]:
    """What a run knows of senses.

    Raises:
        ValueError: it was trained without modalities, or on no needles of them.
    """
    senses, modalities = run.config.senses, run.config.model.modalities
    if modalities is None or senses is None:
        what = "reads text alone" if modalities is None else "was not trained on needles of several senses"
        raise ValueError(
            f"{run.folder} {what}. Train a run that does with: sparse-moe needle train --modalities text,"
            f"image,video,audio; or ask this one without --modalities."
        )
    return senses, modalities


def make_senses_haystacks(
    run: Run, questions: SensesQuestions, length: int
) -> Iterator[tuple[SensesHaystack, HaystackText]]:
    """The haystacks of one length, each of other text, and the text.

    Raises:
        ValueError, OSError: as `SensesQuestions`, `find_text` and `build_senses_haystack`.
    """
    bank = questions.bank(run)
    shares = questions.shares(length)
    for seed, share in zip(questions.seeds(len(shares)), shares, strict=True):
        text = questions.text(run, length, seed)
        haystack = build_senses_haystack(
            bank,
            text.text,
            length=length,
            queries=share,
            seed=seed,
            needles=questions.needles,
            modalities=questions.templates,
            shuffle_values=questions.shuffled,
        )
        yield haystack, text


@cache
def _bank(senses: SensesConfig, modalities: ModalityConfig, seed: int, video: Path | None) -> Bank:
    return build_bank(senses, modalities, "test", seed=seed, film=video)
