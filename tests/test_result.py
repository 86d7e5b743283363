"""Statistics of several clips: the clip rate is a ratio of sums, and nothing syncs before it is asked for."""

import pytest
import torch

from cwclip_kernels import ClipResult
from cwclip_kernels.result import ClipStatistics

NAMES = "a", "b", "c", "d"
CAP = torch.tensor(2.0, dtype=torch.float64)


def result(norms, coefs, caps=CAP):
    return ClipResult(NAMES, torch.tensor(norms), torch.tensor(coefs), caps)


def test_the_clip_rate_is_the_ratio_of_sums():
    """Not the mean of the steps' rates, 1 and 1/4."""
    statistics = ClipStatistics()
    statistics.add(result([4.0, 0.0, 0.0, 0.0], [0.5, 1.0, 1.0, 1.0]))
    statistics.add(result([1.0, 5.0, 1.0, 1.0], [1.0, 0.4, 1.0, 1.0]))
    assert statistics.clip_rate.item() == pytest.approx(2 / 5)
    assert statistics.clip_rates.tolist() == [0.5, 1.0, 0.0, 0.0]
    assert statistics.as_dict()["clip_rate"] == pytest.approx(2 / 5)


def test_numbers_of_several_steps():
    statistics = ClipStatistics()
    assert statistics.as_dict() == {}
    statistics.add(result([4.0, 1.0, 0.0, torch.inf], [0.5, 1.0, 1.0, 0.0]))
    statistics.add(result([1.0, 5.0, 1.0, torch.nan], [1.0, 0.4, 1.0, torch.nan]))
    expected = {"clip_rate": 4 / 7, "clip_ratio_max": 2.5, "component_norm_max": 5.0, "component_norm_nonfinite": 2.0}
    assert statistics.as_dict() == pytest.approx(expected)
    statistics.reset()
    assert statistics.as_dict() == {}
    with pytest.raises(RuntimeError, match="no clip has been added"):
        _ = statistics.clip_rate


@pytest.mark.parametrize("caps", [torch.tensor(0.0), torch.tensor([0.0, 2.0, torch.inf, 0.0])])
def test_caps_of_zero_and_inf(caps):
    """A component without a gradient counts for nothing, whatever its cap makes of the coefficient."""
    statistics = ClipStatistics()
    statistics.add(result([0.0, 1.0, 1.0, 0.0], [0.0, float(caps.max() > 0), float(caps.max() > 0), 0.0], caps))
    found = statistics.as_dict()
    assert found["clip_rate"] == (0.0 if caps.max() > 0 else 1.0)
    assert found["clip_ratio_max"] == (0.5 if caps.max() > 0 else torch.inf)


def test_dtypes_may_change_from_step_to_step():
    """As when a gradient of float64 comes."""
    statistics = ClipStatistics()
    single, double = result([1.0] * 4, [1.0] * 4), result([3.0] * 4, [0.5] * 4)
    statistics.add(single)
    statistics.add(ClipResult(NAMES, double.norms.double(), double.coefs.double(), CAP))
    statistics.add(single)
    assert statistics.as_dict()["component_norm_max"] == 3.0
    assert statistics.clip_rate.item() == pytest.approx(1 / 3)


def test_no_component_at_all():
    statistics = ClipStatistics()
    statistics.add(ClipResult((), torch.zeros(0), torch.ones(0), CAP))
    assert statistics.as_dict() == {}
    assert (statistics.norms.shape, statistics.clip_rate.item()) == ((0,), 0.0)


def test_optimizers_that_own_some_of_the_components_each():
    """Norms are those of each one's last step, in this window or before."""
    statistics = ClipStatistics()
    statistics.add(result([4.0, 4.0, 0.0, 0.0], [0.5, 0.5, 1.0, 1.0]), "first")
    statistics.reset()
    statistics.add(result([0.0, 0.0, 1.0, 5.0], [1.0, 1.0, 1.0, 0.4]), "second")
    assert statistics.norms.tolist() == [4.0, 4.0, 1.0, 5.0]
    assert statistics.clip_rate.item() == 0.5
    statistics.add(result([6.0, 0.0, 0.0, 0.0], [0.5, 1.0, 1.0, 1.0]), "first")
    assert statistics.norms.tolist() == [6.0, 0.0, 1.0, 5.0]


def test_nothing_is_looked_at_before_it_is_asked(monkeypatch):
    looks = []
    own = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: looks.append(1) or own(tensor))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", lambda tensor: pytest.fail("a look at the device"))
        patch.setattr(torch.Tensor, "item", lambda tensor: pytest.fail("a look at the device"))
        statistics = ClipStatistics()
        for _ in range(3):
            statistics.add(result([4.0, 1.0, 0.0, torch.inf], [0.5, 1.0, 1.0, 0.0]))
    assert not looks
    statistics.as_dict()
    assert len(looks) == 1
