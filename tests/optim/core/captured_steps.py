"""The cases of test_capture.py on the pretended device, as JSON: a process of its own, for torch does not forget a
device."""

import json
import sys
import warnings
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))
import test_capture
from captured_cases import CASES, made, stepped
from pretend_device import on_device, pretend
from recorded_graph import captured
from test_capture import replayed


def told_of(name):
    found = {"waits": {}, "replayed": 0}
    host, on_host = made(name, False)
    stepped(host, on_host)
    with pretend() as record:

        def watched(optimizer):
            record.clear()
            graph = captured(optimizer)
            found["waits"] |= {place: count for place, count in (record.waits + record.copies).items() if count}
            return graph

        held, optimizer = made(name, True, on_device)
        with patch.object(test_capture, "captured", watched):
            found["replayed"] = replayed(held, optimizer, device=on_device)
        away = [float((p.held - q).norm() / q.norm()) for p, q in zip(held, host, strict=True)]
    return {**found, "away": max(away)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps({name: told_of(name) for name in sys.argv[1:] or CASES}))
