"""The tables of docs/, written from benchmarks/results/, the Makefile and the table of stages: `make tables`.

    python -m benchmarks.tables            # rewrite every marked block in docs/*.md
    python -m benchmarks.tables --draw     # also redraw benchmarks/results/train.png

A block begins with `<!-- table: NAME -->` and ends with `<!-- end -->`; NAME is a function of `TABLES`, and what stands
between the two lines is replaced. tests/test_docs.py checks that nothing would change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer
from packaging.utils import canonicalize_name

from utils.files import write_text
from utils.pipeline.stages import STAGES
from utils.project import ROOT

DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
# <!-- table: training -->
# | anything | that | was | here |
# <!-- end -->
BLOCK = re.compile(r"(?P<start><!-- table: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(?P<end><!-- end -->)", re.DOTALL)
# demo: $(VENV)/installed  ## the whole series on a CPU
NOTHING = "–"
CONFIGURATIONS = {
    "tutorial": "the tutorial's recipe under unsloth",
    "plain": "the same in plain TRL, PEFT and bitsandbytes",
    "ours": "**profile `t4`: packed, step plan by trials**",
    "ours, 1,024 tokens": "`t4`, packs of 1,024 tokens",
    "ours, 512 tokens": "`t4`, packs of 512 tokens, longer rows cut",
    "unsloth's attention": "`t4` with unsloth's own attention",
    "unsloth packing": "unsloth's own packing and checkpointing",
    "unsloth packing, largest batch": "the same, as many packs at once as fit",
    "plain packing": "TRL's packing on `transformers`' padding-free path",
    "plain packing, 1 x 4": "the same, one pack at a time",
    "ours, xformers' attention": "`t4` with xformers' cutlass kernel",
    "ours, torch's attention": "`t4` with torch's kernel, where xformers loads",
    "ours, flex attention": "`t4` with torch's flex attention",
    "ours, one pack at a time": "`t4` by the plan of least arithmetic",
    "ours, in graphs": "not kept: `t4` in CUDA graphs",
}
REAL_METRICS = (
    "nll", "well_formed", "truncated", "parsed", "multiple_choice", "multiple_choice_forced", "reasoning_tokens",
)  # fmt: skip
TARGET = re.compile(r"^(?P<name>[a-z][\w-]*):[^=\n]*?##\s*(?P<what>.+)$", re.MULTILINE)


def evidence(name: str) -> dict:
    """benchmarks/results/NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]], source: str = "") -> str:
    """A Markdown table, its columns of numbers aligned to the right; `source` is the sentence below it."""
    names, lines = list(header), [[str(cell) for cell in row] for row in rows]
    rule = ["---:" if all(_is_number(line[i]) for line in lines) else "---" for i in range(len(names))]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (names, rule, *lines))
    return f"{text}\n\n{source}" if source else text


def _is_number(cell: str) -> bool:
    """`**11,351**`, `286 s`, `20 of 20`, or nothing."""
    return cell in ("", NOTHING) or cell.lstrip("*")[0].isdigit()


def measured(name: str, what: str) -> str:
    """The line below a table: what was measured, on which GPU, when, and the file that holds it."""
    found = evidence(name)
    where = f"{found['gpu'][0]}, {found['date']}" if found.get("gpu") else found["date"]
    return f"{what}. {where}: {link(name)}."


def link(name: str) -> str:
    return f"[{name}.json](../benchmarks/results/{name}.json)"


def change(result: dict) -> str:
    """A metric's values of both models, and the 95 % interval of their difference."""
    values, digits = [result["base"], result["tuned"], *result["ci95"]], 1 if result["unit"] == "tokens" else 3
    if result["unit"] == "share":
        base, tuned, low, high = (100 * value for value in values)
        return f"{base:.1f} → {tuned:.1f} % ({low:+.1f} to {high:+.1f})"
    base, tuned, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{base} → {tuned} ({low} to {high})"


def training(name: str = "train") -> str:
    rows = [
        (CONFIGURATIONS.get(kind, kind), f"{case['tokens_per_second']:,.0f}", f"{case['kernels']['tokens_per_second']:,.0f}",
         f"{case['reserved_gib']:.2f}", case["fit"]["recompute_layers"],
         f"{case['fit']['per_device_train_batch_size']} × {case['fit']['gradient_accumulation_steps']}")
        for kind, case in evidence(name)["configurations"].items()
    ]  # fmt: skip
    header = ("configuration", "tokens/s", "by kernel time", "GiB reserved", "layers recomputed", "micro-batch × steps")
    return markdown(header, rows, measured(name, "Padding not counted; 8B shapes, 4-bit, fp16, a T4's limits"))


def training_busy() -> str:
    return training("train-busy")


def training_ratios() -> str:
    found, busy = evidence("train"), evidence("train-busy")
    rows = [
        (f"`t4` against {peer}", *(f"{run[name]:.2f}" if name in run else NOTHING
                                   for run in (found, busy) for name in (f"ratio_vs_{key}", f"ratio_vs_{key}_kernel")))
        for key, peer in (("unsloth_packing", "unsloth's packing"), ("tutorial", "the tutorial's recipe"), ("plain", "plain TRL"),
                          ("plain_packing", "TRL's packing"))
    ]  # fmt: skip
    rows.append(("two GPUs against one, on another host", f"{found['ratio_two_gpus']:.2f}", NOTHING, NOTHING, NOTHING))
    shares = [f"{run[key]:.0%}" for run in (found, busy) for key in ("peak_share", "peak_share_kernel")]
    rows.append(("`t4`'s share of the GPU's peak in matrix products", *shares))
    header = ("times as fast", "wall time", "kernel time", "wall time, busy host", "kernel time, busy host")
    source = measured("train", "By each clock the faster configuration of ours, graphs left out, and of the peer")
    return markdown(header, rows, f"{source} The busy host: {busy['gpu'][0]}, {busy['date']}, {link('train-busy')}.")


def training_operations() -> str:
    cases = evidence("train")["configurations"]
    columns = [cases[name]["operations"] for name in ("ours", "ours, one pack at a time", "unsloth packing")]
    rows = [
        (kind, *(f"{column[kind][1]:.0f}" for column in columns))
        for kind in cases["ours"]["operations"]
        if kind != "all else"
    ]
    rows.append(("all", *(f"{sum(ms for _, ms in column.values()):.0f}" for column in columns)))
    header = ("milliseconds of one update", "`t4`, 2 × 2", "`t4`, 1 × 4", "unsloth's packing, 4 × 1")
    return markdown(header, rows, measured("train", "The last update of each measurement, of the same tokens"))


def wall() -> str:
    found = evidence("wall")
    rows = [(part, f"{seconds:.0f} s") for part, seconds in found["parts"].items()]
    rows += [("all", f"{found['seconds']:.0f} s"), ("from `run` to the verdict", f"{found['verdict_seconds']:.0f} s"),
             ("from 03's start to its first update", f"{found['first_update_seconds']:.0f} s"),
             ("trials, of the time to train 4,000 rows", f"{found['trials_share']:.0%}")]  # fmt: skip
    what = ("Profile `t4` with 8B shapes, 32 updates, small numbers of questions, nothing merged; trials as `benchmarks.train` "
            "measured them beside it")  # fmt: skip
    return markdown(("part", "time"), rows, measured("wall", what))


def training_rows() -> str:
    found = evidence("train")["growth"]
    rows = [
        (f"{int(count):,}", f"{case['prepare_seconds']} s", f"{case['tokens_per_second']:,.0f}", case["host_rss_gib"])
        for count, case in found["by_rows"].items()
    ]
    header = ("rows", "preparing them", "tokens/s", "GiB of main memory")
    what = "One window of three updates each, every layer recomputing; eight processes prepared the rows, which they do no more"
    return markdown(header, rows, f"{what}. {found['gpu'][0]}, {found['date']}: {link('train')}.")


def loads() -> str:
    rows = []
    for name, what in (
        ("16bit", "16-bit repository"),
        ("4bit", "4-bit sibling"),
        ("4bit-two", "4-bit sibling, two GPUs"),
    ):
        found = evidence(f"series-{name}")
        stages = found["series"]["stages"].values()
        count = sum(sum(stage["model_loads"].values()) for stage in stages)
        read = f"{count * found['model_bytes'] / 1e9:.0f} GB"
        rows.append((what, count, read, f"{sum(stage['seconds'] for stage in stages):.0f} s"))
    what = "Profile `t4` as above, nothing merged"
    return markdown(("loaded from", "loads", "read", "all stages"), rows, measured("series-4bit", what))


def real_model() -> str:
    cases = evidence("smollm2")["cases"]

    first = next(iter(cases.values()))
    rows = [
        (f"{first['metrics'][name]['label']}, n = {first['metrics'][name]['n']}",
         *(change(case["metrics"][name]) for case in cases.values()))
        for name in REAL_METRICS
    ]  # fmt: skip
    for stage in ("01_baseline_inference", "03_lora_training", "04_comparison"):
        rows.append((f"`{stage}`", *(f"{case['stages'][stage]['seconds']:.0f} s" for case in cases.values())))
    rows.append(("all stages, but 05 in the first alone", *(f"{case['seconds']:.0f} s" for case in cases.values())))
    rows.append(("GiB of GPU memory", *(case["peak_gpu_reserved_gib"] for case in cases.values())))
    what = "Profile `smollm2`, base → fine-tuned, 95 % interval of the difference"
    return markdown(("", *cases), rows, measured("smollm2", what))


def controls() -> str:
    found = evidence("smollm2")
    first = next(iter(found["cases"].values()))
    runs = {"honest": first, **found["controls"]}
    rows = [
        (f"{first['metrics'][name]['label']}, n = {first['metrics'][name]['n']}",
         *(change(run["metrics"][name]) for run in runs.values()))
        for name in ("nll", "multiple_choice", "multiple_choice_forced")
    ]  # fmt: skip
    for claim in ("knows more", "imitates the reference"):
        rows.append(
            (claim, *(next(c["verdict"] for c in run["claims"] if c["claim"] == claim) for run in runs.values()))
        )
    return markdown(("", *runs), rows, measured("smollm2", "SmolLM2-135M, 95 % interval of the difference"))


def letters() -> str:
    rows = [
        (f"{int(length):,} tokens", f"{case['same_letter']} of {case['items']}", f"{case['largest_difference']:.3f}",
         f"{case['median_lead']:.2f}")
        for length, case in evidence("letters")["letters"].items()
    ]  # fmt: skip
    what = "8B shapes with random weights, unsloth against plain transformers, fp16, nats"
    heads = ("behind", "same letter", "largest difference", "median lead of the first letter")
    return markdown(heads, rows, measured("letters", what))


def packing_parity() -> str:
    found = evidence("parity")
    rows = [
        (
            name.replace("-", " "),
            *(f"{run[recipe]['nll']:.4f}" for recipe in ("padded", "packed")),
            f"{run['packed']['nll'] / run['padded']['nll']:.4f}",
        )
        for name, run in found["runs"].items()
    ]
    low, high = found["ci95"]
    ratio = f"Mean ratio {found['nll_ratio']:.4f} ({low:.4f} to {high:.4f}, 95 % interval over {len(rows)} seeds)"
    source = f"{ratio}. {found['gpu'][0]}, {found['date']}: {link('parity')}."
    return markdown(("training", "held-out loss, padded", "packed", "ratio"), rows, source)


def answering() -> str:
    found = evidence("generation")
    rows = [
        (name, case["questions"], f"{case['decoding']['max_new_tokens']:,}", f"{sorted(case['one_at_a_time_windows'])[1]:.0f}",
         f"{case['tokens_per_second']:,.0f}", f"{case['ratio']:.0f} x", f"{case['reserved_gib']:.2f}")
        for name, case in found["cases"].items()
    ]  # fmt: skip
    header = ("questions", "n", "token limit", "one at a time, tokens/s", "batched, tokens/s", "ratio", "GiB reserved")
    return markdown(header, rows, measured("generation", "8B shapes, 4-bit, fp16, a T4's limits, before CUDA graphs"))


def answering_steps() -> str:
    found = evidence("generation")["steps"]
    before = [
        {"way": "launch by launch; unpacked first, another host", **step} for step in found["launch_by_launch"]["steps"]
    ]
    names = {
        "unpacked": "a graph; unpacked first",
        "as this GPU": "a graph; fused where bitsandbytes expects it to pay on an H200",
        "as a T4": "a graph; fused where bitsandbytes expects it to pay on a T4",
    }
    ways = [step | {"way": name} for way, name in names.items() for step in found["ways"] if step["way"] == way]
    rows = [
        (step["way"], step["rows"], f"{step['length']:,}", f"{step['step_ms']:.0f} ms", f"{step['kernel_ms']:.0f} ms",
         f"{step['launches']:,}")
        for step in before + ways
    ]  # fmt: skip
    where = f"8B shapes, 4-bit, fp16, a T4's limits; graphs beside other work on the same host. {found['gpu'][0]}, {found['date']}: {link('generation')}, `steps`."
    return markdown(
        ("a step; its 4-bit weights", "answers at once", "tokens each", "by the clock", "by kernel time", "kernels"),
        rows,
        where,
    )


def series() -> str:
    found = evidence("series-8b")
    stages = found["series"]["stages"]
    rows = [
        (f"`{name}`", f"{stage['seconds']:.0f} s", stage["peak_memory"].get("gpu_reserved_gib", NOTHING), stage["peak_memory"]["rss_gib"])
        for name, stage in stages.items()
    ]  # fmt: skip
    rows.append(("all; peak memory", f"{sum(stage['seconds'] for stage in stages.values()):.0f} s",
                 found["series"]["peak_gpu_reserved_gib"],
                 max(stage["peak_memory"]["rss_gib"] for stage in stages.values())))  # fmt: skip
    settings = found["settings"]
    what = (f"Profile `t4` with 8B shapes, {settings['train.max_steps']} steps, {settings['data.eval_rows']} held-out rows, "
            f"answers of {settings['generate.max_new_tokens']} tokens, a T4's limits")  # fmt: skip
    return markdown(("stage", "time", "GiB of GPU memory", "GiB of main memory"), rows, measured("series-8b", what))


def split() -> str:
    found = evidence("split")
    rows = [(
        f"{found['questions']:,}", f"{found['items']:,}", f"{found['planted_found']} of {found['planted']}",
        found["others_dropped"], f"{found['seconds']} s", found["peak_rss_gib"],
    )]  # fmt: skip
    header = ("questions", "benchmark questions", "planted rewordings found", "others dropped", "time", "GiB of memory")
    return markdown(header, rows, measured("split", found["machine"]))


def scorers() -> str:
    found = evidence("extraction")
    rows = [
        ("strict: an explicit letter after the closed think block", f"{found['strict_accuracy']:.1%}"),
        ("the last letter that stands anywhere", f"{found['any_letter_accuracy']:.1%}"),
        ("the matcher that came with the completions", f"{found['published_scorer_accuracy']:.1%}"),
    ]
    read = found["letterless"]
    source = (f"{found['completions']} completions of a reasoning model, {found['cut_off']:.1%} of them cut off "
              f"({link('extraction')}). Of {read['answers']} answers of SmolLM2 without a letter, labelled by reading, "
              f"{read['false']} got another option than the one it names, and {read['missed']} of the "
              f"{read['name_an_option_in_full']} that name one in full were missed.")  # fmt: skip
    return markdown(("scorer", "accuracy"), rows, source)


def calibration() -> str:
    found = evidence("calibration")["cases"]
    rows = [
        (name, *(f"{case[verdict]:.1%}" for verdict in ("better", "worse")),
         f"{case['announced']:.1%}" if "announced" in case else NOTHING)
        for name, case in found.items()
    ]  # fmt: skip
    one = next(iter(found.values()))
    own = evidence("calibration")["smollm2_answers"]
    stated = [f"{model['letter'] + model['named_in_words']:.0%}" for model in own.values()]
    source = (f"{one['experiments']:,} simulated runs of {one['n']} questions each ({link('calibration')}). Of SmolLM2's "
              f"{own['base']['answers']} answers to MedQA {stated[0]} state an option after a closed think block before "
              f"fine-tuning, and {stated[1]} after it.")  # fmt: skip
    return markdown(("the truth", 'says "better"', 'says "worse"', "announced by 00"), rows, source)


def suffix() -> str:
    found = evidence("suffix")
    metrics = ("parsed", "multiple_choice", "multiple_choice_forced")
    row = (*(change(found["metrics"][name]) for name in metrics), found["verdict"])
    what = f"{found['n']} MedQA questions, answers left to the model → begun with a line of a poem, 95 % interval of the difference"
    source = f"{what}. CPU, {found['date']}: {link('suffix')}."
    return markdown(("state an option", "strict", "forced", "verdict"), [row], source)


def merge() -> str:
    found = evidence("merge")
    copied = min(found["seconds"]["front_to_back"])
    rows = [
        (
            found["gib"],
            found["shards"],
            f"{min(found['seconds']['merge'])} s",
            f"{copied} s",
            f"{found['peak_rss_gib']:.2f}",
        )
    ]
    header = ("GiB of weights", "shards", "merging", "copying alone", "GiB of main memory")
    return markdown(header, rows, measured("merge", f"8B shapes, {found['processors']} cores"))


def gguf() -> str:
    found = evidence("gguf")
    rows = [
        (f"`model-{kind}.gguf`", f"{case['identical']} of {case['prompts']}", f"{found['megabytes'][f'model-{kind}.gguf']} MB")
        for kind, case in found["llama.cpp"].items()
    ]  # fmt: skip
    lora = found["lora_on_base"]
    rows.append(("`adapter-f32.gguf` on the base", f"{lora['identical']} of {lora['prompts']}",
                 f"{found['megabytes']['adapter-f32.gguf']} MB"))  # fmt: skip
    source = measured("gguf", f"The demo's model in llama.cpp ({found['llama.cpp from']})")
    return markdown(("file", "same greedy tokens as in transformers", "size"), rows, source)


def serving() -> str:
    found = evidence("serving")
    rows = [
        (name, f"`{case['line']}`", f"{case['identical']} of {case['prompts']}" if "identical" in case else "not run")
        for name, case in found["servers"].items()
    ]
    reasons = "".join(
        f" {name} was not run: {case['not_run']}." for name, case in found["servers"].items() if "not_run" in case
    )
    source = measured("serving", f"Profile `{found['profile']}`, answers of {found['answer_tokens']:,} tokens together")
    return markdown(("server", "started with", "same greedy tokens as model.generate"), rows, source + reasons)


def repeatability() -> str:
    found = evidence("repeatability")
    rows = [
        ("updates, repeats", f"{found['steps']}, {found['repeats']}"),
        ("largest difference of the last loss, nats per token", f"{found['max_loss_difference']:.5f}"),
        ("largest difference of the loss at any update", f"{found['max_loss_difference_at_any_step']:.5f}"),
        ("largest difference of a trained weight", f"{found['max_weight_difference']:.5f}"),
        ("tolerance for the last loss", f"{found['tolerance']:g}"),
    ]
    return markdown(("", "measured"), rows, measured("repeatability", "8B shapes, 4-bit, fp16, a fresh process each"))


def killed() -> str:
    found = evidence("several")
    rows = [
        (run["processes"], run["date"], run["killed_after_checkpoint"], f"{run['last_loss_difference']:.5f}",
         f"{run['largest_loss_difference']:.5f}", f"{run['largest_weight_difference']:.5f}")
        for run in found["resumed"]
    ]  # fmt: skip
    header = ("GPUs", "measured", "killed after step", "last loss apart", "largest loss apart", "largest weight apart")
    source = (f"A killed and resumed training against an undisturbed one, {found['resumed'][0]['gpu'][0]}, the demo's task; "
              f"two GPUs gave {found['answers']['same']} of {found['answers']['questions']} answers as one did "
              f"({link('several')}).")  # fmt: skip
    return markdown(header, rows, source)


def colab_image() -> str:
    found, pins = evidence("colab-image"), (ROOT / "requirements.txt").read_text(encoding="utf-8")
    reasons = {
        canonicalize_name(pin["name"]): pin["reason"]
        for pin in re.finditer(r"(?m)^(?P<name>[\w-]+)[<>=].*# (?P<reason>.+)$", pins)
    }
    changed = {name: tuple(versions.split(" -> ")) for name, versions in found["after"].items()}
    changed |= {name: (NOTHING, version) for name, version in found["installed"].items()}
    rows = [
        (f"`{name}`", has, becomes, reasons.get(name, "another package asks for it"))
        for name, (has, becomes) in changed.items()
    ]
    left = found["left"]
    source = (f"{len(found['after'])} replaced, {len(found['installed'])} added; {left['used']} others that the series uses "
              f"stay as they are, as does all else of the image ({left['all']} packages in all). {found['image']}, with a "
              f"GPU, by `make drift`: {link('colab-image')}.")  # fmt: skip
    return markdown(("package", "on the image", "after 00", "why"), rows, source)


def stages() -> str:
    rows = [
        (f"`{stage.name}`", " ".join(f"`{path}`" for path in (*stage.outputs, *stage.optional))) for stage in STAGES
    ]
    return markdown(("stage", "writes, below the run directory"), rows)


def make_targets() -> str:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return markdown(("target", "does"), [(f"`make {name}`", what) for name, what in TARGET.findall(makefile)])


TABLES: dict[str, Callable[[], str]] = {
    table.__name__.replace("_", "-"): table
    for table in (
        answering, answering_steps, calibration, colab_image, controls, gguf, killed, letters, loads, make_targets, merge, packing_parity,
        real_model, repeatability, scorers, series, serving, split, stages, suffix,
        training, training_busy, training_operations, training_ratios, training_rows, wall,
    )
}  # fmt: skip


def rewrite(text: str) -> str:
    """A page's text with every marked block as it is now; raises KeyError for a name that `TABLES` lacks."""
    return BLOCK.sub(lambda block: f"{block['start']}{TABLES[block['name']]()}\n{block['end']}", text)


def draw(path: Path) -> None:
    """Bars of each configuration's speed, and where the GPU's time goes in ours."""
    from matplotlib.figure import Figure

    cases = evidence("train")["configurations"]
    figure = Figure(figsize=(10, 0.45 * len(cases) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    places = range(len(cases))
    wall = [case["tokens_per_second"] for case in cases.values()]
    kernel = [case["kernels"]["tokens_per_second"] for case in cases.values()]
    left.barh([p - 0.2 for p in places], wall, 0.38, label="wall time", color="#0b5fa5")
    left.barh([p + 0.2 for p in places], kernel, 0.38, label="kernel time alone", color="#98a2b3")
    left.set_yticks(list(places), list(cases))
    left.invert_yaxis()
    left.set(title="Training, tokens per second", xlabel="8B shapes, 4-bit, fp16, a T4's limits")
    share = cases["ours"]["kernels"]["share"]
    right.barh(list(share), [100 * part for part in share.values()], 0.6, color="#0b5fa5")
    right.invert_yaxis()
    right.set(title="Ours: what the GPU does", xlabel="% of the sum of kernel times")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower left", ncols=2)
    figure.savefig(path, dpi=150)


def main(
    redraw: Annotated[bool, typer.Option("--draw", help="Redraw the plot of training's speed too.")] = False,
) -> None:
    """Rewrite the marked blocks in docs/*.md."""
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = rewrite(before)
        if after != before:
            write_text(page, after)
            print(f"rewrote {page.relative_to(ROOT)}")
    if redraw:
        draw(RESULTS / "train.png")


if __name__ == "__main__":
    typer.run(main)
