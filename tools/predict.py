"""Classify images: classes, confidences, boxes and cost as JSON, and a picture of them.

python tools/predict.py photo.jpg dge/quick
python tools/predict.py photo.jpg configs/anchornet/resnet50_keras.py work_dirs/weights/resnet50_keras.pth
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from patchreg.pictures import IMAGE_HELP, add_checkpoint_argument
from patchreg.pictures.patches import draw_patches
from patchreg.runner.api import load
from patchreg.utils.errors import run_tool
from patchreg.utils.files import write_safely


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Classify images with a trained model: JSON and a picture."
    )
    parser.add_argument("image", help=IMAGE_HELP)
    parser.add_argument("config", help="config file, or its name, e.g. anchornet/quick_dynamic")
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--budget", type=float, help="mean multiply-accumulates per image, for early exit"
    )
    parser.add_argument("--top", type=int, default=5, help="classes to name (default 5)")
    parser.add_argument("--count", type=int, default=8, help="images at most (default 8)")
    parser.add_argument(
        "--out", default="work_dirs/predict", help="folder of predictions.json and .png"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    model = load(arguments.config, arguments.checkpoint, budget=arguments.budget)
    found = model.predict(arguments.image, top=arguments.top, count=arguments.count)
    text = json.dumps([one.record for one in found], indent=1)
    print(text)
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_safely(folder / "predictions.json", (text + "\n").encode())
    draw_patches(found, folder / "predictions.png")
    print(f"written to {folder}: predictions.json, predictions.png", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_tool(main))
