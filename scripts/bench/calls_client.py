"""Makes paid calls as a run's batches do, and prints what became of each prompt: a process of `scripts/bench/calls`."""

from __future__ import annotations

import argparse
import json
import resource
import threading
import time
from collections import Counter
from pathlib import Path

from featurekit_spark import Context, Controller, MemoryCache, aio
from featurekit_spark.llm import LLMCompletion, OpenAIChat
from featurekit_spark.paid.host_limits import HostLimiter
from featurekit_spark.paid.limits import Rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--name", default="p")
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--concurrency", type=int, required=True)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--timeout-s", type=float, default=60.0)
    parser.add_argument("--per-minute", type=float)
    parser.add_argument("--limits-folder")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after so long")
    options = parser.parse_args()
    limiter = None
    if options.per_minute:
        limiter = HostLimiter(options.limits_folder, options.url, Rates(options.per_minute))
    model = OpenAIChat(
        options.url,
        "m",
        api_key_env="FEATUREKIT_BENCH_KEY",
        concurrency=options.concurrency,
        timeout_s=options.timeout_s,
        limiter=limiter,
    )
    model.warm_up()
    # As in a run, where all that batches need was loaded by earlier stages.
    Controller(Context(), MemoryCache()).get_many(LLMCompletion, [("any",)])
    outcomes: Counter[str] = Counter()
    memory: list[float] = []
    first_batch_mb = 0.0
    watch = threading.Thread(target=sample, args=(memory,), daemon=True)
    watch.start()
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, options.prompts, options.batch):
        last = min(first + options.batch, options.prompts)
        controller = Controller(Context(llm=model), MemoryCache())  # answers are kept elsewhere, as by a run
        prompts = [(f"get recommendations for {options.name} {i}",) for i in range(first, last)]
        for (prompt,), feature in zip(prompts, controller.get_many(LLMCompletion, prompts), strict=True):
            right = feature.value == f"1. like {prompt}"
            outcomes["answered" if right else "error" if feature.status == "error" else "WRONG"] += 1
        first_batch_mb = first_batch_mb or max(memory)  # everything is loaded by then
        if time.perf_counter() - start > options.seconds:
            break
    spent, cpu = time.perf_counter() - start, time.process_time() - cpu
    aio.run(model.aclose())
    figures = {
        "outcomes": dict(outcomes),
        "seconds": spent,
        "cpu_ms_per_call": 1000 * cpu / max(1, outcomes.total()),
        "growth_mb": max(memory) - first_batch_mb,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }
    print(json.dumps(figures))


def sample(memory: list[float]) -> None:
    """Resident memory in MB, every 0.1 s."""
    statm = Path("/proc/self/statm")
    page = resource.getpagesize()
    while True:
        memory.append(int(statm.read_text().split()[1]) * page / 1e6)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
