"""vLLM as a peer of `benchmarks/engine.py`, run by the Python of vLLM's own environment.

    python engine_vllm.py FOLDER DTYPE MAX_RUNNING

A line of JSON comes in for each round, `{"concurrency": 8, "jobs": [[prompt tokens, tokens to generate], ..]}`, and one
goes out, `[wall seconds, processor seconds]`; the first that goes out is `[0, 0]`, once the model is loaded. All runs
within this process, so its processor time is all of vLLM's.
"""

import json
import os
import sys
import time


def main() -> int:
    folder, dtype, max_running = sys.argv[1:]
    # What vLLM prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import vllm

    llm = vllm.LLM(
        folder, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, seed=0,
        max_num_seqs=int(max_running), max_num_batched_tokens=512,
    )  # fmt: skip
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    print("[0, 0]", file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        scheduler.max_num_active_reqs = asked["concurrency"]
        llm.reset_prefix_cache()
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in asked["jobs"]]
        params = [
            vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
            for _, count in asked["jobs"]
        ]
        wall, processor = time.perf_counter(), time.process_time()
        told = llm.generate(prompts, params, use_tqdm=False)
        spent = [time.perf_counter() - wall, time.process_time() - processor]
        assert [len(each.outputs[0].token_ids) for each in told] == [count for _, count in asked["jobs"]]
        print(json.dumps(spent), file=answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
