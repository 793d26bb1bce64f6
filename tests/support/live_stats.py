"""Snapshots for tests of what draws them."""

from typing import Any

from saqqara.cluster.live.snapshot import LiveStats


def live_stats(num_layers: int = 4, num_ranks: int = 1, **fields: Any) -> LiveStats:
    """A snapshot of an engine at work; `fields` replace its own."""
    kept = [100.0 * (num_layers - layer) / num_layers for layer in range(num_layers)]
    data: dict[str, Any] = {
        "model": "tiny",
        "retention": "pyramidkv@128",
        "replica": {"id": "r1", "hostname": "host-a", "pid": 7, "started": 1000.0},
        "time": 1100.0,
        "is_ready": True,
        "queue": {"running": 3, "waiting": 2, "finished": {"stop": 12}, "preemptions": 1},
        "throughput": {
            "prompt_tokens_per_second": 1234.5,
            "generation_tokens_per_second": 67.8,
            "window_seconds": 5.0,
            "prompt_tokens": 123456,
            "generation_tokens": 789,
        },
        "kv_cache": {
            "page_tokens": 16,
            "num_pages": 1000 * num_ranks,
            "pages_free": 750 * num_ranks,
            "usage": 0.25,
            "kept_tokens": 150.0,
            "full_tokens": 600,
            "kept_bytes": 2**20,
            "full_bytes": 4 * 2**20,
            "kept_bytes_peak": 2**21,
            "full_bytes_peak": 2**23,
        },
        "pyramid": {
            "is_live": True,
            "num_sequences": 3,
            "kept_tokens": kept,
            "full_tokens": 200.0,
        },
        "ranks": [
            {
                "rank": rank,
                "pipeline_rank": rank,
                "tensor_rank": 0,
                "hostname": f"host-{rank}",
                "device": "cpu",
                "layers": [rank, rank + 1],
                "kv_heads": [0, 2],
                "is_alive": True,
                "num_pages": 1000,
                "pages_free": 750,
                "resident_bytes": 2**29,
                "seconds": {"total": 60.0, "decode": 40.0, "prefill": 20.0},
                "times_lost": 0,
            }
            for rank in range(num_ranks)
        ],
        "recoveries": {"by_cause": {}, "down_seconds": 0.0},
    }
    return LiveStats.model_validate(data | fields)
