"""What a user waits for at first: importing the package, and loading the bundled model, each in fresh processes.

python -m benchmarks.startup               # writes benchmarks/startup.json
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import typer

from benchmarks.timing import machine

RESULT = Path(__file__).with_suffix(".json")
STEPS = ("import torch", "import m2d_embed", "m2d_embed.load_model()")
_TIMED = f"""
import json, time
seconds = []
for step in {STEPS!r}:
    started = time.perf_counter()
    exec(step)
    seconds.append(time.perf_counter() - started)
print(json.dumps(seconds))
"""


def main(runs: int = 7) -> None:
    """Measure, print, and write the JSON; the first run, which fills the disk cache, does not count."""
    times = [json.loads(subprocess.check_output([sys.executable, "-c", _TIMED])) for _ in range(runs + 1)][1:]
    seconds = {
        step: round(statistics.median(column), 3) for step, column in zip(STEPS, zip(*times, strict=True), strict=True)
    }
    result = {"command": f"python -m benchmarks.startup --runs {runs}", "machine": machine(), "seconds": seconds}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for step, median in seconds.items():
        print(f"{step:<24}{median:.3f} s")


if __name__ == "__main__":
    typer.run(main)
