"""Copies that several streams use, with streams and events that only keep a record, since there is no GPU here."""

from types import SimpleNamespace

import pytest
import torch

from cwclip_kernels.backends import memory


class Device:
    """In place of ``torch.cuda``: its current stream, and what streams and tensors were told."""

    def __init__(self):
        self.arrived, self.log, self.stream = False, [], None
        self.Event = lambda: SimpleNamespace(
            record=lambda stream: self.log.append(("record", stream.name)), query=lambda: self.arrived
        )
        self.switch("home")

    def switch(self, name):
        self.stream = SimpleNamespace(name=name, wait_event=lambda event: self.log.append(("wait", name)))

    def current_stream(self, device):
        return self.stream

    def tensor(self):
        return SimpleNamespace(record_stream=lambda stream: self.log.append(("used", stream.name)))


@pytest.fixture
def device(monkeypatch):
    stand_in = Device()
    monkeypatch.setattr(torch, "get_device_module", lambda device: stand_in)
    return stand_in


@pytest.fixture
def copy(device):
    made = memory.Copy([device.tensor()], torch.device("cuda", 0), 7)
    assert device.log == [("record", "home")]
    device.log.clear()
    return made


def test_streams_wait_until_the_copy_is_there(device, copy):
    device.switch("other")
    copy.wait(8)
    copy.wait(8)
    assert device.log == [("wait", "other"), ("used", "other")] * 2
    device.arrived = True
    for _ in range(2):
        device.log.clear()
        copy.wait(8)
        assert device.log == [("used", "other")]
    device.log.clear()
    copy.wait(7)
    assert not device.log


# The stream that copied has been destroyed, and a new one has its handle, hence its id.
def test_a_stream_with_the_id_of_a_destroyed_one_waits(device, copy):
    device.switch("new")
    copy.wait(7)
    assert device.log == [("wait", "new")]


def test_numbers_are_copied_once_for_all_streams(device, monkeypatch):
    uploads = []
    monkeypatch.setattr(memory, "upload", lambda table, device: uploads.append(table.tolist()) or table.clone())
    monkeypatch.setattr(memory, "_pinned", lambda numbers: torch.empty(len(numbers) // 8, dtype=torch.int64))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: device.log.append("used"))
    numbers, gpu = memory.Numbers(), torch.device("cuda", 0)
    one, two = (memory._on_host(n.to_bytes(8, "little")).numpy().tobytes() for n in (1, 2))
    first = numbers.on(gpu, one, 7)
    device.switch("other")
    assert numbers.on(gpu, one, 8) is first
    assert device.log == [("record", "home"), ("wait", "other"), "used"]
    assert numbers.on(gpu, two, 8).tolist() == [2]
    assert uploads == [[1], [2]]
    # The stream that had the old ones has to wait for the new.
    device.switch("home")
    device.log.clear()
    assert numbers.on(gpu, two, 7).tolist() == [2]
    assert device.log == [("wait", "home"), "used"]


def test_nothing_is_asked_of_a_stream_that_is_captured(device, monkeypatch):
    monkeypatch.setattr(memory, "_KEPT_FOR_GRAPHS", kept := [])
    tables = SimpleNamespace(to=lambda device: tables, tensors=lambda: [device.tensor()])
    placed, gpu = memory.Placed(tables), torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="make one before"):
        placed.on(gpu, None)
    placed.on(gpu, 7)
    device.log.clear()
    device.switch("captured")
    assert placed.on(gpu, None) is tables
    assert not device.log
    assert kept == [(tables,)]
