"""What the tests of runs share."""

import pytest

from gracile.train.run import report


@pytest.fixture(autouse=True)
def picture(request, monkeypatch):
    """A run draws its losses only where that is looked at (``draws``): it is a third of a short run. Runs of several
    processes draw theirs."""
    if "draws" not in request.keywords:
        monkeypatch.setattr(report, "plot_losses", lambda folder, *rest: (folder / "loss.png").write_bytes(b""))
