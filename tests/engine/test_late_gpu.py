"""The late device (``tests/late_gpu.py``): faults that come through where all is done at once, planted here, show on it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import surgery
from surgery.engine.ring import Ring
from surgery.errors import SurgeryError
from tests.gpus import only_pretended
from tests.late_gpu import Event, Race, Stream, late_gpu
from tests.models import files_of
from tests.pretend_gpu import GPU

pytestmark = only_pretended


@pytest.fixture(autouse=True)
def late() -> Iterator[dict[str, int]]:
    with late_gpu() as log:
        yield log


def pinned(*values: float) -> torch.Tensor:
    tensor = torch.empty(len(values), pin_memory=True)
    for i, value in enumerate(values):
        tensor[i] = value
    return tensor


def test_pinned_memory_is_read_late() -> None:
    # Through NumPy, as files are read: no operation of torch, which would tell of the race.
    lent = pinned(1, 2)
    there = lent.to(GPU, non_blocking=True)
    lent.detach().numpy()[:] = 7
    assert there.tolist() == [7, 7]
    torch.cuda.synchronize()
    lent.numpy()[:] = 8
    assert there.tolist() == [7, 7]


def test_memory_that_is_not_pinned_is_staged() -> None:
    here = torch.tensor([1.0, 2.0])
    there = here.to(GPU, non_blocking=True)
    here.zero_()
    assert there.tolist() == [1, 2]


def test_a_copy_to_the_host_arrives_when_it_is_waited_for() -> None:
    there = torch.ones(3, device=GPU) * 2
    here = there.to("cpu", non_blocking=True)
    assert here.detach().numpy().tolist() != [2, 2, 2]
    with pytest.raises(Race, match="one stream writes, and the host reads"):
        here + 1
    torch.cuda.current_stream().synchronize()
    assert (here + 1).tolist() == [3, 3, 3]


def test_the_host_may_not_write_what_is_being_copied() -> None:
    lent = pinned(1, 2, 3, 4)
    there = lent[:2].to(GPU, non_blocking=True)
    lent[2:] = 0.0  # another part of the same buffer
    with pytest.raises(Race, match="one stream reads, and the host writes"):
        lent[1] = 0.0
    assert there.tolist() == [1, 2]
    lent[1] = 0.0


def test_streams_wait_for_each_other_only_if_told(late: dict[str, int]) -> None:
    side = torch.cuda.Stream()
    there = torch.ones(4, device=GPU)
    with torch.cuda.stream(side), pytest.raises(Race, match="one stream writes, and another reads"):
        there.sum()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        total = there.sum()
        done = torch.cuda.Event()
        done.record()
        there.mul_(2)  # after the event
    with pytest.raises(Race):
        total.add(1)
    done.wait()
    twice = total * 2
    with pytest.raises(Race, match="writes, and another reads"):
        there.sum()
    before = late["syncs"]
    assert twice.item() == 8
    assert late["syncs"] == before + 1
    there.record_stream(side)
    side.synchronize()
    assert there.tolist() == [2] * 4


def test_one_stream_may_not_overwrite_what_another_reads() -> None:
    there = torch.ones(4, device=GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), pytest.raises(Race):
        there[:2].sum()
        with torch.cuda.stream(torch.cuda.default_stream()):
            there[2:].zero_()  # other bytes
            there[1:].zero_()
    torch.cuda.synchronize()


def test_an_event_is_reached_by_who_asks_twice() -> None:
    there = torch.ones(4, device=GPU) * 3
    here = there.to("cpu", non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    assert not event.query()
    assert event.query()
    assert here.tolist() == [3] * 4
    later = torch.cuda.Event()
    assert later.query()
    there.mul_(2)
    later.record()
    later.synchronize()
    assert later.query()


def test_memory_that_another_stream_still_uses_is_not_lent_again() -> None:
    side = torch.cuda.Stream()

    def use(record: bool) -> None:
        there = torch.ones(4, device=GPU)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            there.sum()
        if record:
            there.record_stream(side)

    use(record=True)
    torch.ones(1, device=GPU)
    use(record=False)
    gc.collect()
    with pytest.raises(Race, match="given back"):
        torch.ones(1, device=GPU)


def test_a_limit_of_memory(late: dict[str, int]) -> None:
    late["largest"] = 1000
    there = torch.ones(250, device=GPU)
    for too_large in (lambda: torch.ones(251, device=GPU), lambda: torch.ones(251).to(GPU), lambda: torch.cat([there, there])):
        with pytest.raises(torch.OutOfMemoryError):
            too_large()
    assert there.add_(1).sum().item() == 500


def test_a_pinned_buffer_lent_again_too_early() -> None:
    def fill(part: memoryview, first: int) -> None:
        part[:] = bytes([first >> 16]) * len(part)

    ring = Ring(GPU, 1 << 20)
    target = torch.empty(8 << 20, dtype=torch.uint8, device=GPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Event, "synchronize", lambda self: None)  # a slot is taken again before it has been copied
        patch.setattr(Event, "query", lambda self: True)
        ring.upload(fill, target)
    torch.cuda.synchronize()
    slots = len(target.cpu().unique())
    ring.upload(fill, target)
    torch.cuda.synchronize()
    assert len(target.cpu().unique()) > slots
    assert target.cpu()[:: 1 << 17].tolist() == [first >> 16 for first in range(0, 8 << 20, 1 << 17)]


def test_page_locked_memory_filled_again_too_early() -> None:
    lent = torch.empty(1 << 17, dtype=torch.uint8, pin_memory=True).fill_(1)
    there = lent.to(GPU, non_blocking=True)
    with pytest.raises(Race, match="one stream reads, and the host writes"):
        lent.fill_(2)
    torch.cuda.synchronize()
    lent.fill_(2)
    assert there.sum().item() == 1 << 17


def never_waits(patch: pytest.MonkeyPatch) -> None:
    for waiting in (Stream, Event):
        patch.setattr(waiting, "synchronize", lambda self: None)
    patch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def uses_copies_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.Tensor, "cpu", lambda self: self.to("cpu", non_blocking=True))


@pytest.mark.parametrize("plant", [None, never_waits, uses_copies_at_once])
def test_faults_of_a_run_show(
    plant: Callable[[pytest.MonkeyPatch], None] | None,
    late: dict[str, int],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if plant is not None:
        plant(monkeypatch)
    try:
        surgery.factorize(llama, tmp_path / "f", rank=4, device="cuda:0")
        surgery.fold(tmp_path / "f", tmp_path / "f/surgery/scales.safetensors", tmp_path / "back", device="cuda:0")
        right = files_of(tmp_path / "back") == files_of(llama)
    except (Race, SurgeryError):
        right = False
    assert late["pinned"]
    assert right == (plant is None)
