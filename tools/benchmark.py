"""Run a benchmark: `python tools/benchmark.py runner --json runner.json`."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path

import torch

from patchreg import benchmarks
from patchreg.utils.errors import ConfigError, run_tool
from patchreg.utils.files import write_safely


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Run a benchmark and print a table of its figures."
    )
    parser.add_argument("name", help=f"one of: {', '.join(benchmarks.names())}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", help="file for the figures")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no GPU is visible to torch here; use --device cpu")
    rows = benchmarks.run(arguments.name, arguments.device)
    width = max(len(row["metric"]) for row in rows)
    print(f"{'':{width}s}       value   baseline    ratio     goal")
    for row in rows:
        cells = [
            "" if row[key] is None else f"{row[key]:.3f}"
            for key in ("value", "baseline", "ratio", "goal")
        ]
        state = {True: "met", False: "MISSED", None: ""}[row["ok"]]
        print(
            f"{row['metric']:{width}s}  {cells[0]:>10s} {cells[1]:>10s} {cells[2]:>8s} {cells[3]:>8s}  "
            f"{row['unit']}  {state}".rstrip()
        )
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine()
    print(
        f"{arguments.device} {where}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    if arguments.json:
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        write_safely(arguments.json, json.dumps(rows, indent=1).encode())
    return 1 if any(row["ok"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run_tool(main))
