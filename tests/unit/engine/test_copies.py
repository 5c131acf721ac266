"""Copies to the device: started once, not used before they have arrived, and somebody is woken when they have."""

from __future__ import annotations

import threading
from dataclasses import replace

import torch

from deltas.bank import PackedDelta
from server.engine.copies import MOST, Copies


class Slow:
    """Copies that arrive when they are told to."""

    def __init__(self) -> None:
        self.arrivals: list[threading.Event] = []

    def __call__(self, delta: PackedDelta) -> tuple[PackedDelta, Arrived]:
        self.arrivals.append(threading.Event())
        return replace(delta, arena=delta.arena.clone()), Arrived(self.arrivals[-1])


class Arrived:
    def __init__(self, event: threading.Event) -> None:
        self.query = event.is_set
        self.synchronize = event.wait


def delta() -> PackedDelta:
    return PackedDelta(torch.arange(4.0), {})


CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_waited_for() -> None:
    copies, here = Copies(CPU, lambda: None), delta()
    assert copies.fetch("a", here) is here
    copies.close()


def test_a_copy_is_started_once_and_fetched_once() -> None:
    woken, transfer, here = threading.Event(), Slow(), delta()
    copies = Copies(CPU, woken.set, transfer)
    assert copies.fetch("a", here) is None
    assert copies.fetch("a", here) is None
    assert len(transfer.arrivals) == 1
    assert not woken.is_set()
    transfer.arrivals[0].set()
    assert woken.wait(60)
    moved = copies.fetch("a", here)
    assert moved is not None
    assert torch.equal(moved.arena, here.arena)
    assert copies.fetch("a", here) is None  # it left the device, and comes again
    assert len(transfer.arrivals) == 2
    transfer.arrivals[1].set()
    copies.close()


def test_another_delta_of_the_name_is_copied_anew_and_the_oldest_are_given_up() -> None:
    transfer = Slow()
    copies = Copies(CPU, lambda: None, transfer)
    here = delta()
    assert copies.fetch("a", here) is None
    assert copies.fetch("a", delta()) is None
    assert len(transfer.arrivals) == 2
    for n in range(MOST):
        copies.fetch(str(n), here)
    for arrival in transfer.arrivals:
        arrival.set()
    assert copies.fetch("0", here) is not None
    assert copies.fetch("a", here) is None
    transfer.arrivals[-1].set()
    copies.close()
