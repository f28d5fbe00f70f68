"""The tables of benchmarks.scaling, made from its JSON."""

import statistics
from typing import Any

from benchmarks.measure import Timing, digits
from benchmarks.record import headline, table
from benchmarks.scaling_learning import DENSE
from benchmarks.scaling_verdicts import PILOT_SEEDS, compared, judge, losses
from moe import doctor
from moe.train.metrics import count

ABSENT = "-"
PAIR_HEAD = ["mean ± 95 %", "sd of differences", "t", "one-sided p", "pairs"]


def render(record: dict[str, Any]) -> str:
    """Both halves, as far as they were measured, as Markdown."""
    parts = [headline(record["environment"])]
    if record.get("cost"):
        parts += [cost_table(record["cost"])]
    if record.get("learning"):
        parts += [
            learning_head(record["learning"]) + commits_of(record),
            learning_table(record["learning"]),
            paired_table(record["learning"]),
        ]
        parts += [verdict_table(record["learning"])]
    return "\n\n".join(parts)


def cost_table(cost: dict[str, Any]) -> str:
    """One row a model and backend."""
    setting = cost["setting"]
    dense = cost["models"][0]
    tokens = setting["batch"] * setting["sequence"]
    head = ["backend", "experts", "total", "active", "MFLOP/token", "forward ms", "forward + backward ms"]
    head += ["decode ms/token", "peak MiB", "x dense"]
    rows = [_cost_row(model, dense) for model in cost["models"]]
    text = (
        f"**Cost**: d={setting['hidden_size']}, {setting['layers']} layers, "
        f"experts of width {setting['expert_width']}, k={setting['top_k']}; "
        f"passes over {tokens} tokens; median (p20-p80) ms, all rows timed in turns; "
        f"x dense: forward + backward; peak: weights, gradients, activations of one pass"
    )
    return f"{text}\n\n{table(head, rows)}"


def _cost_row(model: dict[str, Any], dense: dict[str, Any]) -> list[str]:
    timings = model["timings"]
    shown = [
        str(Timing(**timings[m])) if m in timings else ABSENT
        for m in ("forward", "forward_backward", "decode")
    ]
    both = timings.get("forward_backward"), dense["timings"]["forward_backward"]
    return [
        model["backend"],
        str(model["experts"] or ABSENT),
        count(model["total"]),
        count(model["active"]),
        f"{model['flops_per_token'] / 1e6:.2f}",
        *shown,
        ABSENT if model["peak_bytes"] is None else digits(model["peak_bytes"] / 2**20),
        f"{both[0]['ms'] / both[1]['ms']:.2f}" if both[0] else ABSENT,
    ]


def learning_head(learning: dict[str, Any]) -> str:
    """What was trained on what."""
    setting, corpus = learning["setting"], learning["corpus"]
    where = setting["folder"] or "the standard library of the running interpreter"
    seen = setting["steps"] * setting["batch"] * setting["sequence"]
    return (
        f"**Learning**: d={setting['hidden_size']}, {setting['layers']} layers, "
        f"dense width {setting['width']}, k={setting['top_k']}; "
        f"{setting['steps']} steps of {setting['batch']} x {setting['sequence']} bytes "
        f"({count(seen)}B, {learning['epochs']:.2f} epochs) of {where}, split by file, "
        f"sha256 {corpus['digest'][:12]}; lr {setting['lr']:g} in all arms; "
        f"{setting['seeds']} paired seeds; {learning['jobs']} runs at a time"
    )


def commits_of(record: dict[str, Any]) -> str:
    """The commits of the runs, when they differ from the one over the tables."""
    commits = sorted({run["commit"] for run in record["learning"]["runs"]})
    if commits == [record["environment"]["commit"]]:
        return ""
    return f"; the runs are of commits {', '.join(commits)}"


def learning_table(learning: dict[str, Any]) -> str:
    """One row an arm: size, loss, balance, cost."""
    head = ["arm", "total", "active*", "router", "loss", "sd", "val - train", "MaxVio", "dead"]
    head += ["MFLOP/token", "bytes/s", "s a run", "runs"]
    rows = [_arm_row(learning, arm) for arm in losses(learning)]
    note = (
        "\\* without embedding. Loss: nats a byte on held-out files, mean over seeds. "
        "Train: mean over the last tenth of the steps, on bytes seen for the first time. "
        "MaxVio: worst layer and seed over the same steps. "
        "MFLOP: forward; training takes three times. s: CPU seconds of training."
    )
    return f"{table(head, rows)}\n\n{note}"


def _arm_row(learning: dict[str, Any], arm: str) -> list[str]:
    facts = learning["arms"][arm]
    runs = [run for run in learning["runs"] if run["arm"] == arm]
    values = [run["validation_loss"] for run in runs]
    seconds = statistics.fmean(run["cpu_seconds"] for run in runs)
    violations = [value for run in runs for value in run["max_violation"]]
    return [
        arm,
        count(facts["total"]),
        count(facts["non_embedding_active"]),
        count(facts["router"]) if facts["router"] else ABSENT,
        f"{statistics.fmean(values):.4f}",
        f"{statistics.stdev(values):.4f}" if len(values) > 1 else ABSENT,
        f"{statistics.fmean(run['validation_loss'] - run['training_loss'] for run in runs):+.3f}",
        f"{max(violations):.2f}" if violations else ABSENT,
        str(sum(run["dead_experts"] for run in runs)) if violations else ABSENT,
        f"{facts['forward_flops_per_token'] / 1e6:.2f}",
        count(runs[0]["tokens"] / seconds),
        f"{seconds:.0f}",
        str(len(runs)),
    ]


def paired_table(learning: dict[str, Any]) -> str:
    """Each arm against dense, seed by seed."""
    by_arm = losses(learning)
    rows = []
    for arm, pair in compared(learning).items():
        each = [by_arm[arm][s] - by_arm[DENSE][s] for s in sorted(by_arm[arm])]
        rows.append([arm, *_pair_cells(pair), " ".join(f"{d:+.4f}" for d in each)])
    if not rows:
        return ""
    head = ["arm - dense", *PAIR_HEAD, "by seed"]
    return f"Paired differences in nats a byte; below zero is better than dense.\n\n{table(head, rows)}"


def verdict_table(learning: dict[str, Any]) -> str:
    """Each rule and whether it holds; a failure is printed as one. Then pairs without the pilots' seeds."""
    rows = [(v["rule"], v["seen"], "passed" if v["holds"] else "**FAILED**") for v in judge(learning)]
    text = "\n".join(doctor.table(("rule", "seen", ""), rows))
    fresh = [[arm, *_pair_cells(pair)] for arm, pair in compared(learning, without=PILOT_SEEDS).items()]
    if not fresh:
        return text
    seeds = ", ".join(map(str, PILOT_SEEDS))
    return (
        f"{text}\n\nWithout seed {seeds}, on which pilots had chosen the settings:\n\n"
        f"{table(['arm - dense', *PAIR_HEAD], fresh)}"
    )


def _pair_cells(pair: dict[str, float]) -> list[str]:
    """The columns of PAIR_HEAD."""
    mean = f"{-pair['mean']:+.4f} ± {pair['half_width']:.4f}"
    return [mean, f"{pair['sigma']:.4f}", f"{pair['t']:.1f}", f"{pair['p']:.1e}", str(pair["pairs"])]
