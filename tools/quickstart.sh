#!/usr/bin/env bash
# From a fresh machine to a trained, evaluated and pictured DGE vision transformer beside its dense twin:
#   bash tools/quickstart.sh
# About 15 minutes on 2 CPU cores, installation and download included. CIFAR-10 is fetched when it is not there;
# without network the embedded cut of Fashion-MNIST is used. Everything is written to work_dirs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/environment.sh
make_environment ""

out=work_dirs/quickstart
say "CIFAR-10"
python tools/prepare_data.py cifar10 ||
    echo "going on with the embedded cut of Fashion-MNIST: figures will differ from the README's"

say "training the dense twin"
python tools/train.py configs/dge/dense_quick.py --work-dir "$out/dense"
say "training DGE"
python tools/train.py configs/dge/quick.py --work-dir "$out/dge"

say "comparing on the same test images, in one run"
python tools/compare.py --out "$out" \
    --run "dense twin" configs/dge/dense_quick.py "$out/dense" \
    --run "DGE, dense with hard gates" configs/dge/quick.py "$out/dge" model.backbone.eval_path=dense \
    --run "DGE, sparse" configs/dge/quick.py "$out/dge"

say "drawing what was queried finely"
python tools/visualize.py granularity test configs/dge/quick.py "$out/dge" --out "$out/granularity.png"
say "done: $out/comparison.html, $out/granularity.png; next: python tools/compare.py --quick (all five methods)"
