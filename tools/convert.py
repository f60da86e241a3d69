"""Convert checkpoints between the layouts of the authors, of timm and of this project.

python tools/convert.py dge deit_dge_small.pth work_dirs/deit_small.pth --to ours
python tools/convert.py dge deit_small_patch16_224.safetensors warm.pth --to ours --splits 4 2 1
python tools/convert.py dge --to backbone work_dirs/dge/deit_small/last.pth detector.pth
"""

from __future__ import annotations

import argparse
import sys

from patchreg.runner.convert import convert_file, converters, summary
from patchreg.utils.errors import run_tool

_SHARED = ("method", "source", "out", "to", "layout", "report", "force")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint of a method between layouts.",
        epilog="METHOD --help shows the layouts and options of a method.",
    )
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    found = converters()
    for name, module in found.items():
        layouts = "; ".join(f"{layout}: {what}" for layout, what in module.LAYOUTS.items())
        one = methods.add_parser(name, help=", ".join(module.LAYOUTS), description=layouts)
        one.add_argument("source", metavar="SOURCE", help="checkpoint, .pth or .safetensors")
        one.add_argument("out", metavar="OUT", help="file to write; .safetensors by its name")
        one.add_argument("--to", required=True, choices=module.LAYOUTS, help="layout of OUT")
        one.add_argument(
            "--from",
            dest="layout",
            default="auto",
            choices=["auto", *module.LAYOUTS],
            help="layout of SOURCE (default: found from its keys)",
        )
        one.add_argument("--report", metavar="FILE", help="write the full report as JSON")
        one.add_argument("--force", action="store_true", help="replace files that exist")
        for flag, arguments in module.OPTIONS.items():
            one.add_argument(flag, default=argparse.SUPPRESS, **arguments)
    arguments = vars(parser.parse_args())
    report = convert_file(
        found[arguments["method"]],
        arguments["source"],
        arguments["out"],
        arguments["to"],
        arguments["layout"],
        report_path=arguments["report"],
        force=arguments["force"],
        options={key: value for key, value in arguments.items() if key not in _SHARED},
    )
    print(summary(report))


if __name__ == "__main__":
    sys.exit(run_tool(main))
