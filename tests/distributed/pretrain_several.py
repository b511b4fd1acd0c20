"""Several runs of ``gracile pretrain`` one after the other in the processes of one launch.

torchrun --nproc-per-node 2 pretrain_several.py ARGUMENTS.json, a list of argument lists
"""

import json
import sys
from pathlib import Path

from gracile.train.engines.process_exit import leave
from gracile.train.pretrain import main

if __name__ == "__main__":
    leave(max(main(arguments) for arguments in json.loads(Path(sys.argv[1]).read_text())))
