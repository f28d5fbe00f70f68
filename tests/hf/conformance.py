"""Which Hugging Face families work with what of ours: `make conformance` runs this and writes docs/hf.md.

Every cell is tried on a tiny random model in float32 on the CPU, against transformers' eager experts and
attention. Not a test: it reports what it finds; the tests hold what must stay so.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import moe
from moe.hf import replace_moe_layers, use
from moe.hf.families import FAMILIES

YES, NO, ABSENT = "yes", "no", ""
FAILURES = tiny.FAILURES
LOGITS = {"experts": 1e-6, "layers": 1e-5, "decoder": 1e-5}  # of the largest logit, at least of 1
GRADIENTS = 1e-5
NEW_TOKENS = 16
COLUMNS = ("experts", "layers", "decoder", "save", "generate", "gradient")
HEAD = """# Hugging Face families

Written by `make conformance`. transformers {version}, torch {torch}; tiny random models, float32 on a CPU,
against transformers' eager experts.

| column | what was tried |
|--------|----------------|
| experts | `moe.hf.use(model)`: logits within 1e-6 of transformers' own experts |
| layers | `moe.hf.replace_moe_layers(model)`: logits within 1e-5 |
| decoder | `moe.Decoder.from_pretrained(folder)` of what `save_pretrained` wrote: logits within 1e-5 |
| save | the decoder writes the same tensors under the same names, in both layouts |
| generate | {tokens} greedy tokens with a cache are the same, each way that works |
| gradient | every gradient within 1e-5, each way that works |

"yes", "no", or empty where there is nothing to try: dense families have no experts, experts outside
transformers' registry cannot be switched, and models that are not a causal language model do not generate
here. A "no" means that the request is refused with an error that says why, unless it is explained below.

"""
# The refusals that a "no" stands for, by a part of their words
REFUSALS = ("is no decoder known here", "nothing to replace", "do not go through transformers")


@dataclass
class Row:
    """What was found for one family."""

    family: str
    cells: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def fill(self, column: str, attempt: Callable[[], str | None]) -> bool:
        """Try; the attempt returns what is wrong, or None. Whether it worked."""
        try:
            reason = attempt()
        except FAILURES as error:
            reason = f"{type(error).__name__}: {error}"
        self.cells[column] = YES if reason is None else NO
        if reason is not None and not any(words in reason for words in REFUSALS):
            self.reasons[column] = " ".join(reason.split())[:160]
        return reason is None


def examine(family: str) -> Row:
    """Try everything on one family."""
    row = Row(family, dict.fromkeys(COLUMNS, ABSENT))
    try:
        model = _build(family)
    except RuntimeError as error:
        row.reasons["no tiny model was built"] = " ".join(str(error).split())[:160]
        return row
    if tiny.experts_modules(model):
        model.set_experts_implementation("eager")
    ids = tiny.tokens(model)
    truth = _results(model, ids)
    ways: dict[str, Any] = {}
    if tiny.experts_modules(model):
        ours = copy.deepcopy(model)
        if row.fill("experts", lambda: _compare(_use(ours), ids, truth, "experts")):
            ways["experts"] = ours
    if family not in FAMILIES or FAMILIES[family].is_moe:
        theirs = copy.deepcopy(model)
        if row.fill("layers", lambda: _compare(_replace(theirs), ids, truth, "layers")):
            ways["layers"] = theirs
    with TemporaryDirectory() as root:
        if row.fill("decoder", lambda: _load(model, Path(root), ids, truth, ways)):
            row.fill("save", lambda: _save(ways["decoder"], model, Path(root)))
    if ways:
        if hasattr(model, "generate") and "ForCausalLM" in type(model).__name__:
            _fill_generate(row, model, ways, ids)
        row.fill("gradient", lambda: _gradients(ways, ids, truth))
    return row


def _build(family: str) -> nn.Module:
    """A tiny model of a family; also of one whose experts are outside the registry, or that has none."""
    if family in tiny.registry_families():
        return tiny.build(family)
    reasons = []
    for kind in tiny.model_classes(family):
        try:
            model = tiny.redraw(kind(tiny.tiny_config(kind.config_class)).float()).eval()
            tiny.run(model, tiny.tokens(model))
            return model
        except FAILURES as error:
            reasons.append(f"{kind.__name__}: {type(error).__name__}: {error}")
    raise RuntimeError(" | ".join(reasons) or "none found")


def _results(model: nn.Module, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = tiny.run(model, ids)
    y.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients


def _use(model: nn.Module) -> nn.Module:
    use(model)
    return model


def _replace(model: nn.Module) -> nn.Module:
    replace_moe_layers(model)
    return model


def _compare(model: nn.Module, ids: Tensor, truth: tuple[Tensor, Any], way: str) -> str | None:
    with torch.no_grad():
        return _too_far(tiny.run(model, ids), truth[0], LOGITS[way], "logits")


def _too_far(ours: Tensor, truth: Tensor, limit: float, what: str) -> str | None:
    error = ((ours - truth).abs().max() / truth.abs().max().clamp(min=1)).item()
    return None if error <= limit else f"{what} differ by {error:.1e}"


def _load(
    model: nn.Module, root: Path, ids: Tensor, truth: tuple[Tensor, Any], ways: dict[str, Any]
) -> str | None:
    for layout in ("hub", "packed"):
        model.save_pretrained(root / layout, save_original_format=layout == "hub")
        decoder = moe.Decoder.from_pretrained(root / layout)
        with torch.no_grad():
            if reason := _too_far(decoder(ids).logits, truth[0], LOGITS["decoder"], f"{layout}: logits"):
                return reason
    ways["decoder"] = decoder.requires_grad_()
    return None


def _save(decoder: moe.Decoder, model: nn.Module, root: Path) -> str | None:
    for layout in ("hub", "packed"):
        decoder.save_pretrained(root / f"{layout} again", layout=layout)
        ours, theirs = (load_file(root / f / "model.safetensors") for f in (f"{layout} again", layout))
        if ours.keys() != theirs.keys():
            return f"{layout}: keys {sorted(ours.keys() ^ theirs.keys())[:3]}"
        if not all(torch.equal(ours[key], theirs[key]) for key in theirs):
            return f"{layout}: tensors differ"
    return None


def _fill_generate(row: Row, model: nn.Module, ways: dict[str, Any], ids: Tensor) -> None:
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    try:
        expected = model.generate(ids, **options)
    except FAILURES as error:
        row.reasons["generate"] = f"transformers' own generation fails on the tiny model: {error}"[:160]
        return

    def attempt() -> str | None:
        for way, ours in ways.items():
            given = {"max_new_tokens": NEW_TOKENS, "temperature": 0} if way == "decoder" else options
            if not torch.equal(ours.generate(ids, **given), expected):
                return f"{way}: other tokens"
        return None

    row.fill("generate", attempt)


def _gradients(ways: dict[str, Any], ids: Tensor, truth: tuple[Tensor, dict[str, Tensor]]) -> str | None:
    for way, ours in ways.items():
        if way == "decoder":
            ours.zero_grad()
            ours(ids).logits.square().mean().backward()
            found = _by_their_names(ours, truth[1])
        else:
            found = _results(ours, ids)[1]
        for name, gradient in truth[1].items():
            if name in found and (reason := _too_far(found[name], gradient, GRADIENTS, f"{way}: {name}")):
                return reason
    return None


def _by_their_names(decoder: moe.Decoder, names: dict[str, Tensor]) -> dict[str, Tensor]:
    from moe.hf.tensor_names import find_place

    own = dict(decoder.named_parameters())
    places = {name: find_place(name) for name in names}
    return {name: place.view(own[place.name].grad) for name, place in places.items() if place is not None}


def render(rows: list[Row]) -> str:
    """The page."""
    versions = {"version": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    lines = [HEAD.format(**versions, tokens=NEW_TOKENS)]
    lines += ["| family | " + " | ".join(COLUMNS) + " |\n", "|---" * (1 + len(COLUMNS)) + "|\n"]
    lines += [f"| {row.family} | " + " | ".join(row.cells[c] for c in COLUMNS) + " |\n" for row in rows]
    counts = [str(sum(row.cells[c] == YES for row in rows)) for c in COLUMNS]
    lines += [f"| **{len(rows)} families, yes** | " + " | ".join(f"**{n}**" for n in counts) + " |\n"]
    lines += ["\n## What is not simply refused\n\n"]
    lines += [f"- {row.family}, {what}: {reason}\n" for row in rows for what, reason in row.reasons.items()]
    return "".join(lines)


def main(page: str) -> None:
    """Try all families and write the page."""
    transformers.logging.set_verbosity_error()
    dense = [name for name, family in FAMILIES.items() if not family.is_moe]
    families = sorted({*tiny.registry_families(), *tiny.other_moe_families(), *dense})
    rows = []
    for number, family in enumerate(families, start=1):
        print(f"{number}/{len(families)} {family}", flush=True)
        rows.append(examine(family))
    Path(page).parent.mkdir(exist_ok=True)
    Path(page).write_text(render(rows), encoding="utf-8")
    print(f"written: {page}")


if __name__ == "__main__":
    main(sys.argv[1])
