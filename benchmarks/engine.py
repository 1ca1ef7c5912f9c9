"""The engine against `generate` of transformers, side by side in one run.

    python benchmarks/engine.py [--threads 2] [--runs 5] [--dtype float32] [--size 34m] [--device cuda]
        [--vllm-python PATH]

A random Qwen3 of 34 million parameters (or 0.3 billion); every pair is run in turn (A B A B ..), and the median of the
ratios is printed, of wall time and of processor time (which other work on the machine disturbs less), with what is
promised. For throughput there are twice as many requests as may run at once, and `generate` takes them in padded
batches of that size. Only tokens that were asked for count. Every run starts with an empty prefix cache.

`--vllm-python` is the Python of an environment that has vLLM, which gets the same weights and requests in each round.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = {
    "34m": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
            "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16384},
    "0.3b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 20, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32768},
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One request: prompt tokens and how many to generate."""

    prompt: list[int]
    num_tokens: int


@dataclass(frozen=True)
class Seconds:
    """What one run took."""

    wall: float
    processor: float


@dataclass
class Bench:
    """Both sides with the same weights."""

    engine: Any
    peer: Any
    runs: int

    def limit(self, concurrency: int) -> None:
        """At most so many requests at once from here on."""
        from flagscale.inference.engine import Engine, EngineConfig

        self.engine = Engine(self.engine.model, config=EngineConfig(max_running=concurrency))

    def answer(self, jobs: list[Job], n: int = 1) -> None:
        from flagscale.inference.engine import SamplingParams

        params = [SamplingParams(temperature=0, max_tokens=job.num_tokens, ignore_eos=True, n=n) for job in jobs]
        self.engine.generate([job.prompt for job in jobs], params)

    def arrive(self, jobs: list[Job]) -> None:
        """One more request before each step."""
        from flagscale.inference.engine import SamplingParams

        for job in jobs:
            params = SamplingParams(temperature=0, max_tokens=job.num_tokens, ignore_eos=True)
            self.engine.add_request(job.prompt, params)
            self.engine.step()
        while self.engine.has_work:
            self.engine.step()

    def forget(self) -> None:
        """An empty prefix cache, so that no run profits from the one before."""
        self.engine.update_weights(0, {})

    def padded(self, jobs: list[Job], batch: int) -> None:
        """Batches of transformers: prompts padded on the left, as long as the longest answer in the batch."""
        import torch

        for at in range(0, len(jobs), batch):
            part = jobs[at : at + batch]
            longest = max(len(job.prompt) for job in part)
            blanks = [longest - len(job.prompt) for job in part]
            ids = [[0] * blank + job.prompt for blank, job in zip(blanks, part, strict=True)]
            mask = [[0] * blank + [1] * (longest - blank) for blank in blanks]
            self.peer.generate(
                input_ids=torch.tensor(ids, device=self.peer.device),
                attention_mask=torch.tensor(mask, device=self.peer.device),
                max_new_tokens=max(job.num_tokens for job in part),
                do_sample=False,
                pad_token_id=0,
            )

    def wait(self) -> None:
        import torch

        if self.peer.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, work: Callable[[], "Seconds | None"]) -> Seconds:
        self.forget()
        self.wait()
        wall, processor = time.perf_counter(), time.process_time()
        if (own := work()) is not None:
            return own
        self.wait()
        return Seconds(time.perf_counter() - wall, time.process_time() - processor)

    def rounds(self, *works: Callable[[], "Seconds | None"], times: int = 1) -> list[list[Seconds]]:
        """Each work in turn, again and again; the first round is not counted. A work may time itself."""
        return [[self.time(work) for work in works] for _ in range(times * self.runs + 1)][1:]


class Vllm:
    """vLLM in a process of its own environment, with the same weights."""

    def __init__(self, python: str, peer: Any, dtype: str, max_running: int, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        peer.save_pretrained(self._folder.name)
        script = Path(__file__).with_name("engine_vllm.py")
        own = {
            "OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        }  # fmt: skip
        self._log = Path(self._folder.name) / "log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(script), self._folder.name, dtype, str(max_running)],
                env={**os.environ, **own}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._read()

    def answer(self, jobs: list[Job], concurrency: int) -> Seconds:
        assert self._process.stdin is not None
        asked = {"concurrency": concurrency, "jobs": [[job.prompt, job.num_tokens] for job in jobs]}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def _read(self) -> Seconds:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"vLLM ended: {self._log.read_text()[-2000:]}")
        return Seconds(*json.loads(line))


def make_bench(size: str, dtype: str, runs: int, device: str = "cpu") -> Bench:
    import copy

    import torch
    import transformers

    from flagscale.inference.engine import Engine

    config = transformers.Qwen3Config(**SIZES[size], max_position_embeddings=2048, tie_word_embeddings=True,
                                      eos_token_id=None, bos_token_id=None)  # fmt: skip
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval().to(device)
    peer.set_attn_implementation("sdpa")
    print(
        f"{peer.num_parameters() / 1e6:.0f} M parameters, {dtype}, {device}, {torch.get_num_threads()} threads",
        flush=True,
    )
    return Bench(Engine(copy.deepcopy(peer)), peer, runs)


def draw_prompt(draw: random.Random, size: int) -> list[int]:
    return [draw.randrange(1, 16000) for _ in range(size)]


def draw_jobs(count: int, seed: int) -> list[Job]:
    """Unequal requests: prompts of 16 to 128 tokens, answers of 8 to 128, short ones more often than long ones."""
    draw = random.Random(seed)
    return [Job(draw_prompt(draw, draw.randint(16, 128)), int(8 * 16 ** draw.random())) for _ in range(count)]


def tell(
    name: str, promised: str, rounds: list[list[Seconds]], ratio: Callable[[list[float]], float] = lambda s: s[1] / s[0]
) -> None:
    wall, processor = (
        statistics.median(ratio([getattr(each, clock) for each in one]) for one in rounds)
        for clock in ("wall", "processor")
    )
    told = " / ".join(f"{statistics.median(each.wall for each in column):.3f}" for column in zip(*rounds, strict=True))
    print(
        f"{name:62s} {wall:5.2f} (wall) {processor:5.2f} (processor)   promised {promised:6s}  ({told} s)", flush=True
    )


def measure_throughput(bench: Bench, concurrency: int, vllm: Vllm | None) -> None:
    jobs = draw_jobs(2 * concurrency, concurrency)
    bench.limit(concurrency)
    works: list[Callable[[], Seconds | None]] = [lambda: bench.answer(jobs), lambda: bench.padded(jobs, concurrency)]
    if vllm is not None:
        works.append(lambda: vllm.answer(jobs, concurrency))
    rounds = bench.rounds(*works)
    name = f"throughput at {concurrency} unequal requests at once, to"
    tell(f"{name} generate's", ">= 2", [each[:2] for each in rounds])
    if vllm is not None:
        tell(f"{name} vLLM's", ">= 0.7", [[each[0], each[2]] for each in rounds])


def measure_single(bench: Bench) -> None:
    single = [Job(draw_prompt(random.Random(1), 64), 64)]
    rounds = bench.rounds(lambda: bench.answer(single), lambda: bench.padded(single, 1))
    tell("throughput of a single stream, to generate's", ">= 1", rounds)


def measure_samples(bench: Bench) -> None:
    same = Job(draw_prompt(random.Random(2), 64), 64)
    rounds = bench.rounds(lambda: bench.arrive([same] * 8), lambda: bench.answer([same], n=8))
    tell("throughput of 8 requests one by one, to one with n=8", ">= 0.8", rounds)


def measure_prefix(bench: Bench) -> None:
    """What a prefix adds to 32 short requests, against computing it once."""
    draw = random.Random(5)
    prefix, tails = draw_prompt(draw, 64), [draw_prompt(draw, 8) for _ in range(32)]
    rounds = bench.rounds(
        lambda: bench.answer([Job(prefix + tail, 1) for tail in tails]),
        lambda: bench.answer([Job(tail, 1) for tail in tails]),
        lambda: bench.answer([Job(prefix, 1)]),
        times=4,
    )
    tell("cost of a 64-token prefix of 32 requests, to one prefill", "<= 1.2", rounds, lambda s: (s[0] - s[1]) / s[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="for both sides (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="counted rounds (default: 5)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--size", choices=SIZES, default="34m")
    parser.add_argument("--device", default="cpu", help="where torch runs both sides (default: cpu)")
    parser.add_argument("--vllm-python", help="the Python of an environment that has vLLM, to compare with (on a CPU)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    torch.set_num_threads(args.threads)
    bench = make_bench(args.size, args.dtype, args.runs, args.device)
    vllm = Vllm(args.vllm_python, bench.peer, args.dtype, 32, args.threads) if args.vllm_python else None
    measure_throughput(bench, 8, vllm)
    measure_throughput(bench, 32, vllm)
    if vllm is not None:
        vllm.close()
    bench.limit(64)
    measure_single(bench)
    measure_samples(bench)
    measure_prefix(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
