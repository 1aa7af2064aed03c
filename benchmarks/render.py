"""Put the checked-in results into the tables of README, docs and model card: ``python -m benchmarks.render``."""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.quality import SCORES

PROBES = {"linear": "linear", "mlp": "MLP of the HEAR protocol", "knn": "kNN"}
HEADLINE = {False: "accuracy", True: "mAP"}  # by whether clips have any number of labels
ROOT = Path(__file__).parents[1]
CARD = ROOT / "weights" / "README.md"
STARTUP = Path(__file__).with_name("startup.json")
CPU_SPEEDS = ("speed-amx_bf16-family6.json",)  # of this version
EARLIER_SPEEDS = sorted(path for path in ROOT.glob("benchmarks/speed-*.json") if path.name not in CPU_SPEEDS)
TRAINING = Path(__file__).with_name("training.json")
SHORT_RUN = Path(__file__).with_name("short_run.json")
QUALITY = Path(__file__).with_name("quality.json")
FINETUNING = Path(__file__).with_name("finetuning.json")  # removed with the weights it was measured on
GPU_TRAINING = Path(__file__).with_name("training-gpu.json")


def speed_tables(files: list[Path]) -> str:
    lines = [
        "The peer is the same architecture written in timm's style in float32, fed by nnAudio as in the reference "
        "runtime; all take turns in one run, and ratios are to it. Share: what the model's own operations, from "
        "waveform to embedding, reach of what the processor's units do from registers in that precision. Memory is "
        "that beyond the loaded model, for 8 clips of 10 s."
    ]
    for file in files:
        result = json.loads(file.read_text())
        plot = f"![Seconds of audio per second of each runtime](images/{file.with_suffix('.png').name})"
        lines += ["", f"### {on_cores(result['machine'])}", "", plot, speed_table(result)]
    others = [f"`{path.relative_to(ROOT)}`" for path in EARLIER_SPEEDS]
    return "\n".join([*lines, "", f"Other processors, measured on earlier versions: {', '.join(others)}."])


def speed_table(result: dict[str, Any]) -> str:
    lines = []
    for model, measured in result["models"].items():
        lines += ["", f"**{model}**", ""]
        lines += [
            "| runtime | one clip of 1 s | 8 clips of 10 s | ratio | share | load and first result | memory |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [speed_row(row, measured) for row in cell_of(measured, 10, 8)["runtimes"]]
        rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in measured["matrix products, GFLOP/s"].items())
        hours = "; ".join(
            f"{dtype} {taken['seconds']:.0f} s and {taken['MiB']:.0f} MiB beyond the loaded model"
            for dtype, taken in measured["an hour in one file"].items()
        )
        units = ", ".join(f"{name} {rate:,.0f}" for name, rate in measured["units alone, GFLOP/s"].items())
        alone = f" The processor's units alone, from registers: {units}." if units else ""
        cosines = dict(measured["least cosine similarity with float32"])
        clips = cosines.pop("clips")
        shown = ", ".join(f"{mode} {cosine:.5f}" for mode, cosine in cosines.items())
        lines += [
            "",
            f"GFLOP/s of matrix products: {rates}.{alone} A file of an hour: {hours}. Least cosine similarity of scene "
            f"embeddings with float32, {clips} real clips: {shown}.",
        ]
    further = "".join(f", then by `{command}`" for command in dict.fromkeys(result["further rounds"]))
    lines += ["", f"Measured by `{result['command']}`{further}; all lengths and batch sizes are in its JSON."]
    return "\n".join(lines)


def cell_of(measured: dict[str, Any], seconds: int, batch: int) -> dict[str, Any]:
    found: dict[str, Any] = next(c for c in measured["cells"] if (c["clip"], c["batch"]) == (seconds, batch))
    return found


def speed_row(row: dict[str, Any], measured: dict[str, Any]) -> str:
    name = row["runtime"]
    short = [found for found in cell_of(measured, 1, 1)["runtimes"] if found["runtime"] == name]
    start = measured["start"][name]
    cells = [
        name,
        f"{1000 * short[0]['seconds']:.1f} ms (x{short[0]['ratio']:.2f})" if short else "",
        f"{row['seconds of audio per second']:,.0f} s/s",
        f"{row['ratio']:.2f}",
        "" if row["share of units"] is None else f"{row['share of units']:.0%}",
        f"{start['load and first result, s']:.2f} s",
        f"{start['8 clips of 10 s, MiB']:.0f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def training_table(result: dict[str, Any]) -> str:
    rates = result["matrix products, GFLOP/s"]
    gains = "; ".join(f"x{measured['bf16 to fp32']:.2f} for {name}" for name, measured in result["models"].items())
    lines = [
        f"Clips per second of M2D pre-training, whole steps with reading the data, {result['data']}, one data worker, "
        f"on {on_cores(result['machine'])}. The peer is a plain PyTorch loop in float32: log-mels from one `.npy` a "
        "clip, a timm-style ViT with explicit softmax attention, AdamW and EMA tensor by tensor; all take turns in one "
        "run.",
        "",
        "| model | loop | clips per s | ratio | waiting for data |",
        "| --- | --- | ---: | ---: | ---: |",
        *(training_row(*row) for row in training_rows(result)),
        "",
        f"bf16 over fp32 of m2d-embed: {gains}; of this processor's matrix products: "
        f"x{rates['bfloat16'] / rates['float32']:.1f}.",
    ]
    return "\n".join([*lines, "", f"Measured by `{result['command']}`."])


def gpu_training_table(result: dict[str, Any]) -> str:
    lines = [
        f"The same on one {result['gpu']}, {result['data workers']} data workers, torch {result['machine']['torch']}. "
        "Utilisation is the model's own operations (forward and backward, nothing recomputed) as a share of the "
        f"{result['bf16 products, TFLOP/s']:.0f} TFLOP/s that large bf16 matrix products reach on it.",
        "",
        "| model | loop | clips per s | ratio | waiting for data | utilisation | peak memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, row in training_rows(result):
        memory = f"{row['peak memory, GiB']:.1f} GiB"
        lines.append(f"{training_row(model, row)} {row['utilisation']:.1%} | {memory} |")
    return "\n".join([*lines, "", f"Measured by `{result['command']}`."])


def short_run_table(result: dict[str, Any]) -> str:
    scores = result["accuracy in %"]
    sets = list(next(iter(scores.values())))
    lines = [
        f"A ViT-Tiny after {result['minutes']:.0f} minutes of pre-training from scratch ({result['recipe']}; "
        f"{result['crops']:,} crops) on {on_cores(result['machine'])}, against the same encoder with random weights; "
        "linear probe / kNN, accuracy in % on labelled sets that were not trained on:",
        "",
        f"| weights | {' | '.join(sets)} |",
        f"| --- |{' ---: |' * len(sets)}",
    ]
    for weights, by_set in scores.items():
        cells = [f"{by_set[name]['linear']:.1f} / {by_set[name]['knn']:.1f}" for name in sets]
        lines.append(f"| {weights} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Measured by `{result['command']}`."])


def quality_table(result: dict[str, Any]) -> str:
    sets, scores = result["sets"], result[SCORES]
    probes = [probe for probe in PROBES if probe in next(iter(next(iter(scores.values())).values()))]
    heads = [f"{name}, {HEADLINE[multi_label(scores, name)]}" for name in sets]
    described = "; ".join(
        f"{name}: {facts['clips']} clips, {facts['labels']} labels, {facts['test folds']} test "
        f"fold{'s' if facts['test folds'] > 1 else ''}"
        for name, facts in sets.items()
    )
    lines = [
        f"Probes of scene embeddings in %, {' / '.join(PROBES[probe] for probe in probes)}, each with half the width "
        f"of its 95 % bootstrap interval ({described}).",
        "",
        f"| model | values | {' | '.join(heads)} |",
        f"| --- | ---: |{' ---: |' * len(sets)}",
    ]
    for model, by_set in scores.items():
        if is_local(model):
            continue
        cells = [quality_cell(by_set[name], probes) for name in sets]
        lines.append(f"| {model} | {next(iter(by_set.values()))['dimensions']} | {' | '.join(cells)} |")
    command = re.sub(r" --model \.\./\S+", "", result["command"])
    return "\n".join([*lines, "", f"Measured by `{command}`."])


def is_local(model: str) -> bool:
    """Whether a model is a folder of whoever measured, which no reader has."""
    return model.startswith("../")


def quality_cell(measured: dict[str, Any], probes: list[str]) -> str:
    return " / ".join(plus_minus(measured[probe].get("accuracy", measured[probe]["mAP"])) for probe in probes)


def multi_label(scores: dict[str, Any], name: str) -> bool:
    measured = next(iter(scores.values()))[name]
    return not any("accuracy" in measured[probe] for probe in PROBES if probe in measured)


def finetuning_table(result: dict[str, Any]) -> str:
    lines = [
        "The bundled model fine-tuned, against the linear probe of the same model trained on the same clips; accuracy "
        "in % with half the width of its 95 % bootstrap interval. The default settings were chosen among some twenty "
        "by results on these same folds, so on other data they likely gain less; the probe chose nothing on them.",
        "",
        "| set | tested | linear probe | fine-tuned | minutes of training |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, measured in result.items():
        folds = "all folds" if measured["fold"] == "all" else f"fold {measured['fold']}"
        cells = [plus_minus(cell) for cell in measured["accuracy in % with 95 % interval"].values()]
        tested = f"{folds}, {measured['tested clips']} clips"
        lines.append(f"| {name} | {tested} | {' | '.join(cells)} | {measured['training minutes']:.0f} |")
    commands = "; ".join(f"`{measured['command']}`" for measured in result.values())
    machine = on_cores(next(iter(result.values()))["machine"])
    return "\n".join([*lines, "", f"On {machine}, beside other work. Measured by {commands}."])


def plus_minus(score: list[float]) -> str:
    value, low, high = score
    return f"{value:.1f} ± {(high - low) / 2:.1f}"


def training_rows(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each row with the name of its model."""
    return [
        (f"{name}, batch {measured['batch']}", row)
        for name, measured in result["models"].items()
        for row in measured["loops"]
    ]


def training_row(model: str, row: dict[str, Any]) -> str:
    return f"| {model} | {row['loop']} | {row['clips per second']:.1f} | {row['ratio']:.2f} | {row['data share']:.1%} |"


def on_cores(machine: dict[str, Any]) -> str:
    units = ", ".join(machine["matrix units"]) or "no matrix units"
    family = f", family {machine['family']}" if machine.get("family") else ""
    return f"{machine['cores']} cores of {machine['cpu']}{family} ({units}), torch {machine['torch']}"


def startup_sentence(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    source = f"`{result['command']}`, {on_cores(result['machine'])}"
    return (
        f"`import m2d_embed` takes {seconds['import m2d_embed']:.2f} s more than `import torch`, and loading the "
        f"bundled model {seconds['m2d_embed.load_model()']:.2f} s ({source})."
    )


def replace_section(text: str, name: str, content: str) -> str:
    """Exchange what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    replaced, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"expected one section {name!r} in the text, found {count}.")
    return replaced


def main() -> None:
    speeds = [file for name in CPU_SPEEDS if (file := Path(__file__).with_name(name)).exists()]
    training = training_table(json.loads(TRAINING.read_text()))
    if GPU_TRAINING.exists():
        training += "\n\n" + gpu_training_table(json.loads(GPU_TRAINING.read_text()))
    quality = quality_table(json.loads(QUALITY.read_text()))
    finetuned = finetuning_table(json.loads(FINETUNING.read_text())) if FINETUNING.exists() else ""
    docs = ROOT / "docs"
    for file, sections in {
        ROOT / "README.md": {"quality": quality},
        docs / "probes.md": {"quality": quality},
        docs / "speed.md": {
            "speed": speed_tables(speeds),
            "startup": startup_sentence(json.loads(STARTUP.read_text())),
        },
        docs / "finetuning.md": {"finetuning": finetuned},
        docs / "pretraining.md": {
            "training": training,
            "short-run": short_run_table(json.loads(SHORT_RUN.read_text())),
        },
        CARD: {"quality": quality},
    }.items():
        text = file.read_text(encoding="utf-8")
        for name, content in sections.items():
            text = replace_section(text, name, content)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
