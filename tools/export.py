"""Export a part of a trained model to ONNX or torch.export, checked against PyTorch.

python tools/export.py patchdrop/quick_finetune --part policy --format onnx --out policy.onnx
python tools/export.py dge/quick --part model --format onnx --out dge.onnx \
    --cfg-options model.backbone.eval_path=dense
"""

from __future__ import annotations

import argparse
import sys

from mmengine.config import DictAction

from patchreg.pictures import add_checkpoint_argument
from patchreg.runner.export import FORMATS, export_file
from patchreg.utils.errors import run_tool


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Export a part of a trained model: one file that needs no patchreg."
    )
    parser.add_argument("config", help="config file, or its name, e.g. dge/dense_quick")
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--part",
        help="model, backbone, policy, localiser or ranker; without it, the tool says which there are",
    )
    parser.add_argument("--format", choices=list(FORMATS), default="onnx", help="default: onnx")
    parser.add_argument("--out", required=True, help="file to write, .onnx or .pt2")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, help="overrides of the config"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    print(
        export_file(
            arguments.config,
            arguments.checkpoint,
            arguments.part,
            arguments.out,
            arguments.format,
            options=arguments.cfg_options,
        )
    )


if __name__ == "__main__":
    sys.exit(run_tool(main))
