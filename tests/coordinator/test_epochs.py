"""Who is in a communicator, epoch by epoch."""

from __future__ import annotations

import pytest

from dsml_gpu.coordinator.epochs import Epoch, Epochs
from dsml_gpu.errors import InvalidValue


def test_ranks_are_numbered_anew_and_seats_are_not() -> None:
    epochs = Epochs([Epoch(1, (0, 1, 2, 3))])
    epochs.begin(epochs.next([0, 2, 3]))
    assert epochs.present == Epoch(2, (0, 2, 3))
    assert epochs.kept(epochs.of(1)) == (0, 2, 3)
    assert epochs.kept(epochs.of(0)) == (0, 2, 3), "0 is the first one"
    assert epochs.kept(epochs.of(2)) == (0, 1, 2)
    epochs.begin(epochs.next([2, 3]))
    assert epochs.kept(epochs.of(1)) == (2, 3)
    assert epochs.kept(epochs.of(2)) == (1, 2)


def test_an_epoch_that_does_not_know_who_came_later_cannot_be_used() -> None:
    epochs = Epochs([Epoch(1, (0, 1))])
    assert epochs.next_seat == 2
    epochs.begin(epochs.next([0, 1, 2]))
    with pytest.raises(InvalidValue, match=r"3 ranks in epoch 2, of which epoch 1 knows 2"):
        epochs.kept(epochs.of(1))
    assert epochs.kept(epochs.of(2)) == (0, 1, 2)
    # Once they have gone, it can.
    epochs.begin(epochs.next([0]))
    assert epochs.kept(epochs.of(1)) == (0,)
    assert epochs.next_seat == 3, "a seat is nobody else's, ever"


def test_an_epoch_that_never_was_is_refused() -> None:
    with pytest.raises(InvalidValue, match="no epoch 7 of the communicator; the present one is 1"):
        Epochs([Epoch(1, (0,))]).of(7)


def test_epochs_of_before_a_restart_are_known() -> None:
    epochs = Epochs([Epoch(2, (0, 2)), Epoch(1, (0, 1, 2))])
    assert epochs.present.number == 2
    assert epochs.kept(epochs.of(0)) == (0, 2)
    epochs.begin(epochs.next([2]))
    assert epochs.present.number == 3
