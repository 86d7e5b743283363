"""What tests rely on, where it can go wrong without a test noticing."""

import warnings

import pytest
import torch

from no_sync import no_sync


def test_no_sync_leaves_torchs_check_off_whatever_happens(monkeypatch):
    """Left on, it would fail every later test that copies something to the device."""
    modes = []

    def set_mode(mode):
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)  # as torch does

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(UserWarning, match="prototype"):  # here a warning is an error
        set_mode("error")
    modes.clear()
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: set_mode(mode) if mode == "error" else modes.append(mode))
    with no_sync():
        pass
    with pytest.raises(RuntimeError, match="called a synchronizing"), no_sync():
        raise RuntimeError("called a synchronizing CUDA operation")
    assert modes == ["error", "default"] * 2
