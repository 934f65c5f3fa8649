"""benchmarks.restart: each way starts empty once and filled in turns, and the ratios are turn by turn."""

import json

from benchmarks import restart


def test_every_way_starts_empty_and_then_filled(monkeypatch, capsys):
    starts: list[tuple[str, str]] = []

    def started(depth: int, cache: str, way: restart.Way) -> tuple[float, ...]:
        name = next(name for name, known in restart.WAYS.items() if known == way)
        empty = (name, cache) not in starts
        starts.append((name, cache))
        # the machine gets slower by the minute: only turns compare
        slow = (len(starts) - 1) // len(restart.WAYS)
        return 40.0 if empty else slow * (2 if way.kept else 3), 1.0, 7.0 + way.blocks

    monkeypatch.setattr(restart, "started", started)
    restart.main(["--depth", "2", "--turns", "3", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert len({cache for _, cache in starts}) == len(restart.WAYS)
    assert {name: cold[0] for name, cold in row["cold"].items()} == dict.fromkeys(restart.WAYS, 40.0)
    assert {len(each) for each in row["starts"].values()} == {3}
    one, without, blocks = (row["ratios"][name] for name in restart.WAYS)
    assert one == [1, 1, 1] and without[0] == 1.5 and blocks[0] == 1 and blocks[2] == 8 / 7
    restart.main(["--depth", "2", "--turns", "2"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in restart.WAYS) and "2 blocks" in printed
