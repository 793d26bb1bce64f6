"""What `saqqara top` draws says what the snapshot does, on a terminal of any size."""

import pytest
from support.live_stats import live_stats

from saqqara.cluster.live.snapshot import LiveStats
from saqqara.cluster.top.numbers import count, share, size, span
from saqqara.cluster.top.view import Look, draw, grouped, waiting

WIDE = Look(120, plain=True)


def text(stats: LiveStats, look: Look = WIDE, **more: object) -> str:
    return "\n".join(line.plain for line in draw(stats, look, **more))  # type: ignore[arg-type]


def test_it_says_what_the_snapshot_says() -> None:
    shown = text(live_stats(), now=1100.0)
    for part in (
        "tiny  ready  pyramidkv@128  up 1 min  replica r1",
        "in  1,234  out     68",
        "running 3  waiting 2  ended 12 stop  preempted 1",
        "25.0%  1.0 MiB of 4.0 MiB full",
        "250 of 1,000 used  25.0% on the fullest rank  context 150 of 600 tokens kept",
        "tokens kept of 200  mean of 3 running",
        "1 of 1 alive",
        "alive  host-0  layers 0-0    pages  25.0%  busy 1 min  decode 40 s  prefill 20 s",
    ):
        assert part in shown, part


def test_an_engine_without_ranks_is_drawn() -> None:
    assert "0 of 0 alive" in text(live_stats(num_ranks=0))


def test_the_pyramid_stands_on_layer_0() -> None:
    lines = text(live_stats(num_layers=4)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layers"))
    bars = lines[start + 1 : start + 5]
    assert [int(bar.split()[0]) for bar in bars] == [3, 2, 1, 0]
    widths = [bar.count("#") for bar in bars]
    assert widths == sorted(widths)
    assert widths[0] / widths[3] == pytest.approx(25 / 100, abs=0.02)
    assert bars[3].split()[-2:] == ["100", "50.0%"]


@pytest.mark.parametrize("is_recovering", [False, True])
@pytest.mark.parametrize(("num_layers", "num_ranks"), [(1, 1), (30, 2), (126, 16)])
def test_it_fits_every_terminal(num_layers: int, num_ranks: int, is_recovering: bool) -> None:
    stats = live_stats(num_layers, num_ranks, is_ready=not is_recovering)
    for width in (1, 10, 20, 40, 80, 132, 300):
        for height in (1, 2, 5, 8, 10, 24, 50, 200):
            lines = draw(stats, Look(width, height), notice="gone" if is_recovering else None)
            assert 1 <= len(lines) <= height
            assert all(line.cell_len <= width for line in lines)
            shown = "\n".join(line.plain for line in lines)
            if width >= 80 and height >= 24:
                assert "ranks " in shown
                assert f"{min(num_layers, 3)}" in shown
                assert "layers" in shown
            if width >= 40 and height >= 8:
                assert "tokens/s" in shown


def test_many_layers_and_ranks_share_what_room_there_is() -> None:
    shown = text(live_stats(num_layers=80, num_ranks=64), Look(100, 30, plain=True))
    assert "0-" in shown
    assert "and " in shown
    assert "more" in shown


def test_layers_that_share_a_line_have_their_mean() -> None:
    kept = [float(layer) for layer in range(10)]
    assert grouped(kept, 20) == [(str(layer), float(layer)) for layer in range(10)]
    groups = grouped(kept, 3)
    assert [name for name, _ in groups] == ["0-2", "3-6", "7-9"]
    assert [mean for _, mean in groups] == [1.0, 4.5, 8.0]
    assert grouped(kept, 1) == [("0-9", 4.5)]


def test_lost_ranks_and_recoveries_are_seen() -> None:
    ranks = [rank.model_dump() | {"is_alive": False} for rank in live_stats(4, 2).ranks]
    ranks[1]["times_lost"] = 3
    recoveries = {"by_cause": {"died": 2, "hung": 1}, "down_seconds": 75.0}
    stats = live_stats(4, 2, is_ready=False, ranks=ranks, recoveries=recoveries)
    shown = text(stats, Look(160, plain=True))
    assert "recovering" in shown
    assert "0 of 2 alive  recovered 3 times (2 died, 1 hung), 1 min down" in shown
    assert "gone   host-1" in shown
    assert "lost 3 times" in shown


def test_time_by_phase_is_that_since_the_last_look() -> None:
    before = live_stats()
    rank = before.ranks[0].model_dump() | {"seconds": {"total": 62.0, "decode": 41.0}}
    after = live_stats(time=1104.0, ranks=[rank])
    assert "busy  50%  decode  25%" in text(after, before=before)


def test_a_label_alone_is_dim() -> None:
    for line in draw(live_stats(), WIDE):
        assert line.style == ""
        dim = [span for span in line.spans if span.style == "dim"]
        assert all(span.end - span.start < len(line.plain) for span in dim)


def test_an_engine_that_never_ran() -> None:
    nothing = {"is_live": False, "num_sequences": 0, "kept_tokens": [0.0] * 4, "full_tokens": 0.0}
    kv = live_stats().kv_cache.model_dump() | {"kept_bytes": 0, "full_bytes": 0}
    shown = text(live_stats(pyramid=nothing, kv_cache=kv))
    assert "nothing has run yet" in shown
    assert "0 B of 0 B full" in shown


def test_names_cannot_command_the_terminal() -> None:
    shown = text(live_stats(model="a\x1b]0;owned\x07b\u009b2J\ncut", retention="full"))
    assert all(c.isprintable() for line in shown.split("\n") for c in line)
    assert "a?]0;ownedb?2J?cut" in shown


def test_waiting_is_told_in_what_room_there_is() -> None:
    lines = waiting("waiting for http://127.0.0.1:8000: connection refused", Look(20, 2))
    assert len(lines) == 2
    assert all(line.cell_len <= 20 for line in lines)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count(0), "0"),
        (count(0.34), "0.3"),
        (count(9999), "9,999"),
        (count(12_345), "12.3k"),
        (count(4_560_000), "4.6M"),
        (size(0), "0 B"),
        (size(1536), "1.5 KiB"),
        (size(3 * 2**40), "3.0 TiB"),
        (share(1, 8), "12.5%"),
        (share(1, 0), "-"),
        (span(-1), "0 s"),
        (span(3 * 3600 + 240), "3 h 4 min"),
        (span(90_000), "1 d 1 h"),
    ],
)
def test_numbers_are_short(shown: str, expected: str) -> None:
    assert shown == expected
