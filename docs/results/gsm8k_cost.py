"""What the runs of `bash train.sh gsm8k` cost: in time here, in hours on a GPU, and where a step's time goes.

    python docs/results/gsm8k_cost.py hours DATA --model M --epochs N --steps N --batch N   here
    python docs/results/gsm8k_cost.py profile DATA --model M     a PPO step by phase and operation
    python docs/results/gsm8k_cost.py plans                      larger models on GSM8K, on one GPU

DATA is a folder that gsm8k.py has made. The hours follow from the best matrix product, which is measured.
"""
import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

from lib import chat, files, hf, logs, parallel, plan, recipe  # noqa: E402
import model as M  # noqa: E402
import ppo  # noqa: E402
import rlsp  # noqa: E402

# The share of the best matrix product that a training pass and a decode step of 64 rows reach.
REACHED = {"bfloat16": 0.35, "float32": 0.5}
# The sizes in the config.json files that Meta and Qwen publish with the models of these names.
MODELS = {
    "Llama-3.2-1B": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_theta=500000.0, tie_word_embeddings=True, rope_scaling=dict(
            rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192)),
    "Qwen2.5-0.5B": dict(
        model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6,
        rope_theta=1000000.0, tie_word_embeddings=True)}
# GSM8K's recipe in the flags of `rlsp.py plan`: an arm and seed with its SFT and the last evaluation. Prompts
# and demonstrations (120) have these tokens in SmolLM2's; responses are taken to be half as long again. 60
# steps are for a processor; a GPU has time for more.
GSM8K = dict(steps=500, rollout_batch=64, train_batch=32, max_response=256, mean_prompt=72, mean_response=180,
             sft_examples=3636, sft_tokens=200, sft_max_tokens=1024, sft_epochs=3, sft_batch=32,
             test_problems=1319, test_samples=5, test_response=180, test_max_response=256, gpus=1,
             gpus_per_node=1)


def lengths(folder, asked):
    """Mean tokens of the prompts and of the demonstrations."""
    shown = [row for _, row in files.read_jsonl(folder / "sft.jsonl")]
    prompts = [len(asked.prompt_ids(row["problem"])) for row in shown]
    answers = [len(asked.response_ids("".join(text for text, _ in row["solution"]))) for row in shown]
    return len(shown), sum(prompts) / len(shown), sum(answers) / len(shown)


def duration(seconds):
    return f"{seconds / 3600:.1f} hours" if seconds >= 2 * 3600 else f"{seconds / 60:.0f} minutes"


def hours(folder, model, epochs, steps, batch):
    """Print how long SFT and an arm of PPO should take here, without the evaluations. Responses of PPO are
    taken to be half as long again as demonstrations."""
    config = hf.read_config(model)
    dtype = parallel.compute_type()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = logs.matrix_peak(device, getattr(torch, dtype))
    rate = REACHED[dtype] * peak
    shown, prompt, answer = lengths(folder, chat.Chat(model))
    c = ppo.PPOConfig(rollout_batch=batch, recompute=False)
    sft = epochs * shown * 3 * (prompt + answer) * plan.flops_token(config, prompt + answer) / rate
    arm = steps * sum(plan.flops(config, c, prompt, 1.5 * answer).values()) / rate
    print(f"{peak:.2g} FLOP/s in {dtype}; prompts of {prompt:.0f} and answers of {answer:.0f} tokens: "
          f"SFT some {duration(sft)}, {steps} steps of PPO some {duration(arm)} for each arm and seed, "
          "evaluations not counted")


def profile(folder, model, responses, longest=96):
    """Print where the time of a PPO step goes: phases, and operations within each."""
    problems = [row for _, row in files.read_jsonl(folder / "train.jsonl")]
    with tempfile.TemporaryDirectory() as run:
        device, mesh = parallel.start()
        c = ppo.PPOConfig(rollout_batch=responses, train_batch=responses, max_response=longest,
                          temperature=1.0, dtype=parallel.compute_type(), exploration="none",
                          recompute=False, freeze_steps=0, micro_tokens=1000)
        trainer = ppo.Trainer(c, model, problems, chat.Chat(model), run, device, mesh)
        samples = trainer.rollout()  # the first one also makes what later ones find
        batch = trainer.experience(samples)
        tokens = int(batch["length"].sum())
        print(f"{responses} responses, {tokens} tokens, {int(batch['mask'].sum())} of them sampled; "
              f"{torch.get_num_threads()} threads")
        phases = {"rollout": trainer.rollout, "scoring": lambda: trainer.experience(samples),
                  "update": lambda: trainer.update(batch)}
        for name, function in phases.items():
            timer = logs.Timer()
            with torch.profiler.profile() as found, timer(name):
                function()
            events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
            total = sum(event.self_cpu_time_total for event in events)
            print(f"\n{name}: {timer.seconds[name]:.1f} s, {timer.cpu_seconds():.1f} s of processor time")
            for event in events[:8]:
                share = 100 * event.self_cpu_time_total / total
                print(f"  {share:5.1f} %  {event.key[:60]}, {event.count} calls")


def plans():
    """Print for each larger model the command of its run and what `rlsp.py plan` says of it."""
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in GSM8K.items())
    for name, config in MODELS.items():
        print(f"MODEL={name} GSM8K=gsm8k STEPS={GSM8K['steps']} bash train.sh gsm8k\n"
              f"python rlsp.py plan --model {name} {flags}\n")
        recipe.report(M.Config.from_dict(config), rlsp.Plan(model=name, **GSM8K), 1)
        print()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("hours", "profile"):
        ask = commands.add_parser(name)
        ask.add_argument("data", type=Path)
        ask.add_argument("--model", required=True)
        if name == "hours":
            for flag in ("--epochs", "--steps", "--batch"):
                ask.add_argument(flag, type=int, required=True)
        else:
            ask.add_argument("--responses", type=int, default=32)
    commands.add_parser("plans")
    args = vars(parser.parse_args())
    command = args.pop("command")
    if command == "plans":
        plans()
    elif command == "hours":
        hours(args["data"], args["model"], args["epochs"], args["steps"], args["batch"])
    else:
        profile(args["data"], args["model"], args["responses"])


if __name__ == "__main__":
    main()
