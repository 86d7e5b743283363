"""What tests rely on, where it can go wrong without a test noticing."""

import warnings

import pytest
import torch

from no_sync import no_sync


@pytest.mark.filterwarnings("error")
def test_no_sync_leaves_torchs_check_off_whatever_happens(monkeypatch):
    """Left on, it would fail every later test that copies something to the device."""
    modes = []

    def set_mode(mode):
        modes.append(mode)
        if mode == "error":  # as torch does, once
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with no_sync():
        pass
    with pytest.raises(RuntimeError, match="called a synchronizing"), no_sync():
        raise RuntimeError("called a synchronizing CUDA operation")
    assert modes == ["error", "default"] * 2
