"""Draw the losses of two runs that should be the same run: one process against several ranks.

    python recipes/sft.py configs/sft_quickstart.yaml sap.cp_size=1 training.output_dir=outputs/cp1 ...
    accelerate launch --config_file configs/accelerate/cpu2.yaml recipes/sft.py configs/sft_quickstart.yaml \
        training.output_dir=outputs/cp2 ...
    python benchmarks/loss_curves.py outputs/cp1 outputs/cp2 --out benchmarks/results/loss_curves

Each output folder holds Trainer's trainer_state.json. Writes OUT.csv (step, loss and gradient norm of both runs) and
OUT.png (the curves, and their difference below).
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(folder: Path) -> dict[int, tuple[float, float]]:
    """{step: (loss, gradient norm)} of a run."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: (entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry}


def main() -> None:
    """Compare two runs step by step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("one", type=Path, help="output folder of the one-process run")
    parser.add_argument("several", type=Path, help="output folder of the run on several ranks")
    parser.add_argument(
        "--out", type=Path, required=True, help="path of the picture and the data, without a suffix"
    )
    options = parser.parse_args()
    one, several = read(options.one), read(options.several)
    steps = sorted(one.keys() & several.keys())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss_one", "loss_several", "grad_norm_one", "grad_norm_several"])
        writer.writerows(
            (step, one[step][0], several[step][0], one[step][1], several[step][1]) for step in steps
        )

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, height_ratios=[3, 1])
    above.plot(steps, [one[step][0] for step in steps], label="one process", linewidth=3, alpha=0.4)
    above.plot(steps, [several[step][0] for step in steps], label="several ranks", linewidth=1)
    above.set_ylabel("training loss")
    above.legend()
    difference = [abs(one[step][0] - several[step][0]) for step in steps]
    below.semilogy(steps, [max(value, 1e-9) for value in difference], linewidth=1)
    below.set_ylabel("|difference|")
    below.set_xlabel("optimizer step")
    figure.tight_layout()
    figure.savefig(options.out.with_suffix(".png"), dpi=120)
    relative = max(d / one[step][0] for d, step in zip(difference, steps, strict=True))
    print(f"{len(steps)} steps, largest difference {max(difference):.2e}, relative {relative:.2e}")


if __name__ == "__main__":
    main()
