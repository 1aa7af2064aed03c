"""Put the checked-in results into the README's tables: ``python -m benchmarks.render``."""

import json
import re
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
STARTUP = Path(__file__).with_name("startup.json")
THROUGHPUT = Path(__file__).with_name("throughput.json")


def throughput_table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    units = ", ".join(machine["matrix units"]) or "no matrix units"
    lines = [
        f"Seconds of audio embedded per second, {result['clips']}, on {machine['cores']} cores of {machine['cpu']} "
        f"({units}), torch {machine['torch']}. The peer is the same architecture written in timm's style in float32, "
        "fed by nnAudio as in the reference runtime; all take turns in one run.",
        "",
        "| model | runtime | s of audio per s | ratio |",
        "| --- | --- | ---: | ---: |",
    ]
    for model, rows in result["models"].items():
        for row in rows:
            speed = row["seconds of audio per second"]
            lines.append(f"| {model} | {row['runtime']} | {speed:.1f} | {row['ratio']:.2f} |")
    rates = result["matrix products, GFLOP/s"]
    lines += [
        "",
        f"Matrix products of ViT-Base's shape run at {rates['float32']:.0f} GFLOP/s in float32 as PyTorch does them, "
        f"at {rates['float32 through oneDNN']:.0f} as m2d-embed does, and at {rates['bfloat16']:.0f} in bfloat16 here "
        f"(x{rates['bfloat16'] / rates['float32']:.1f}), which is about the most that bf16 can gain on this processor.",
    ]
    return "\n".join([*lines, "", f"Measured by `{result['command']}`."])


def startup_sentence(result: dict[str, Any]) -> str:
    seconds = result["seconds"]
    return (
        f"`import m2d_embed` takes {seconds['import m2d_embed']:.2f} s more than `import torch`, and loading the "
        f"bundled model {seconds['m2d_embed.load_model()']:.2f} s (`{result['command']}`, same machine)."
    )


def replace_section(text: str, name: str, content: str) -> str:
    """Exchange what stands between ``<!-- name -->`` and ``<!-- /name -->``."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    replaced, count = re.subn(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{README}: expected one section {name!r}, found {count}.")
    return replaced


def main() -> None:
    text = README.read_text(encoding="utf-8")
    text = replace_section(text, "throughput", throughput_table(json.loads(THROUGHPUT.read_text())))
    text = replace_section(text, "startup", startup_sentence(json.loads(STARTUP.read_text())))
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
