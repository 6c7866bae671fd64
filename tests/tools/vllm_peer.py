"""Run by tests/tools/bench.py with the Python of a virtual environment that has vllm: decodes a file of prompts, prints seconds and tokens."""
import json
import sys
import time

from vllm import LLM, SamplingParams


def main():
    job = json.load(open(sys.argv[1]))
    llm = LLM(job["model"], dtype="bfloat16", max_model_len=1024, max_num_seqs=job["slots"], **job["memory"])
    params = SamplingParams(temperature=job["temperature"], max_tokens=job["max_new"], stop_token_ids=job["eos"])
    prompts = [{"prompt_token_ids": p} for p in job["prompts"]]
    llm.generate(prompts[:4], params, use_tqdm=False)
    print("READY", flush=True)
    for _ in sys.stdin:  # one line, one round: interleaved with the others
        start = time.perf_counter()
        out = llm.generate(prompts, params, use_tqdm=False)
        print("RESULT", time.perf_counter() - start, sum(len(o.outputs[0].token_ids) for o in out), flush=True)


if __name__ == "__main__":
    main()
