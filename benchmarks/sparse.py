"""What sparse training pays and costs, in one run: layers for inference beside dense and peers, then the optimizers'
steps, changes of masks and state beside torch's fused AdamW.

    python benchmarks/sparse.py
    python benchmarks/sparse.py --one_thread        # on a machine that others use

The parts can be run alone, with more options: sparse_layers.py, sparse_steps.py. Perplexities: pretrain_sparse.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PARTS = (
    ("sparse_layers.py", "--sparsities", "0.9"),
    ("sparse_steps.py", "--size", "60m"),
    ("sparse_steps.py", "--size", "350m"),
)


def main() -> None:
    for script, *options in PARTS:
        command = [sys.executable, str(Path(__file__).with_name(script)), *options, *sys.argv[1:]]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
