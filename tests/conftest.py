"""Every test run has its own, empty Hugging Face cache and no network."""

import atexit
import os
import shutil
import tempfile

_cache = tempfile.mkdtemp(prefix="gracile-test-cache-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
# Before anything imports huggingface_hub or datasets: they read these once.
os.environ.update(
    HF_HOME=_cache, HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false"
)
