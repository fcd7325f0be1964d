"""What ranks tell each other, and what is refused, with a stand-in for torch.distributed's store."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tri_mpk import DeviceError, RankError, distributed
from tri_mpk.distributed import Ranks, check_machines


def together(num_ranks: int, call) -> list:
    """What `call(ranks)` returns or raises on each rank: threads of this process, one store."""
    store = dist.HashStore()
    found: list = [None] * num_ranks
    made = [Ranks(rank, num_ranks, store, None) for rank in range(num_ranks)]
    for ranks in made:
        ranks.store = dist.PrefixStore("test", store)

    def run(rank: int) -> None:
        try:
            found[rank] = call(made[rank])
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_everybody_hears_everybody():
    def talk(ranks: Ranks) -> list:
        return [ranks.meet("a test", (ranks.rank, i)) for i in range(5)]

    assert together(3, talk) == [[[(0, i), (1, i), (2, i)] for i in range(5)]] * 3


def test_who_does_not_come_is_named():
    def talk(ranks: Ranks) -> list | None:
        return None if ranks.rank in (1, 3) else ranks.meet("a test", bound_s=0.2)

    for error in together(4, talk)[::2]:
        assert isinstance(error, RankError) and error.ranks == (1, 3)
        assert "ranks 1, 3 did not come to a test within 0.2 s" in str(error)


def test_what_differs_is_named_on_all_ranks():
    for error in together(
        3, lambda ranks: ranks.agree("a test", {"same": 1, "colour": "green" if ranks.rank else "red"})
    ):
        assert isinstance(error, ValueError)
        assert "a test: colour differs between ranks, 'red' on rank 0 and 'green' on rank 1" in str(error)


def test_words_after_a_launch():
    def talk(ranks: Ranks):
        if ranks.rank == 2:
            return None
        for launch in range(4):
            ranks.say(f"launch {launch}", "trouble" if ranks.rank == 1 else "")
        return ranks.hear("launch 3", 0.2)

    assert together(3, talk)[:2] == [([2], {1: "trouble"})] * 2


@pytest.mark.parametrize(
    ("text", "gpus", "reachable"),
    [
        (None, [("H200", "a"), ("H200", "b")], True),
        ("GPU differs between ranks, 'H200' on rank 0 and 'H100' on rank 1", [("H200", "a"), ("H100", "b")], True),
        ("have the same GPU", [("H200", "a"), ("H200", "a")], True),
        ("cannot access", [("H200", "a"), ("H200", "b")], False),
    ],
)
def test_machines_that_do_not_fit_together(monkeypatch, text, gpus, reachable):
    def properties(device: torch.device) -> SimpleNamespace:
        name, uuid = gpus[device.index]
        return SimpleNamespace(name=name, uuid=uuid, multi_processor_count=132, total_memory=1 << 37)

    monkeypatch.setattr(distributed.torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(distributed.torch.cuda, "can_device_access_peer", lambda a, b: reachable)
    for error in together(2, lambda ranks: check_machines(ranks, torch.device("cuda", ranks.rank))):
        assert error is None if text is None else isinstance(error, DeviceError) and text in str(error), error


def test_ranks_that_do_not_come_to_connect(monkeypatch: pytest.MonkeyPatch):
    def alone(**_: object) -> None:
        raise dist.DistStoreError("timed out")

    for name, value in {"is_initialized": True, "get_rank": 0, "get_world_size": 2}.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(dist, "new_group", alone)
    with pytest.raises(RankError, match=r"the other ranks did not come to connect within 300 s \(timed out\)"):
        distributed.connect(2, 0, torch.device("cpu"))
