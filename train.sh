#!/usr/bin/env bash
# Runs the recipe on a machine that has nothing but Python 3.10 or newer. It sets up .venv, then:
#
#   bash train.sh                             tiny model from scratch on CPU: SFT, PPO, evaluation of each stage
#   MODEL=folder DATA=file bash train.sh ...  a Hugging Face model with the paper's values, on all GPUs (or one process)
#   bash train.sh experiment                  the paper's comparison on the tiny model; takes some hours
#   SETTING=rare bash train.sh experiment     the same with half as many searches in SFT; SETTING=hacking: rewards that pay for words
#   MODEL=folder GSM8K=folder bash train.sh gsm8k   SFT and PPO of a small real model on GSM8K; several hours per arm
#   MODEL=folder SETTING=sums bash train.sh gsm8k   the same on short sums, for processors without bfloat16; half an hour per arm
#   bash train.sh test ...                    the tests; further arguments go to pytest
#   bash train.sh setup                       only .venv
#
# Further arguments go to `rlsp.py ppo`, for example --steps 50. Paths are relative to the current folder. Variables:
#
#   RUN                  folder to write; if it is that of a stopped run, finished stages are kept and the others continue
#   SEED                 default 0; for experiment SEEDS="0 1 2 3 4" and ARMS="none length ..."
#   VENV                 folder for the packages instead of .venv; VENV=none uses those of the active Python
#   SFT_DATA             with MODEL: demonstrations; without them PPO starts from MODEL itself
#   EVAL_DATA            with MODEL: problems for evaluating MODEL before and after each stage: one file, evaluated into
#                        RUN/eval, or several, "math500.jsonl aime.jsonl", each into RUN/eval-NAME
#   SFT_FLAGS, PPO_FLAGS, EVAL_FLAGS   with MODEL: flags for a stage, which override those of the recipe; they are split into
#                        words as by a shell, with quotes: SFT_FLAGS="--epochs 2 --prompt 'Problem: {problem}'"
#   SHARD_RANKS, SAMPLER with MODEL: the flags of the same names, for all stages
#
# On several nodes, run the same command on each with NNODES, NODE_RANK (0, 1, ...), RDZV (host:port of node 0) and the
# same RUN, in folders that all nodes see. Under torchrun (torchrun ... --no-python bash train.sh) it joins that job.
# Exit status 75 means that a signal stopped the run; the same command with RUN continues it.
if [ -z "${BASH_VERSION:-}" ]; then exec bash "$0" "$@"; fi  # sh train.sh
set +o posix
set -euo pipefail
HERE=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
TINY=$HERE/data/tiny
. "$HERE/lib/launch.sh"
. "$HERE/lib/setup.sh"

# The three stages of SFT. $1 is the folder for the runs, $2 the file of demonstrations.
tiny_sft() {
    local small="--dtype float32 --no-recompute --adam-eps 1e-5 --seed $SEED"
    echo "== SFT 1: arithmetic facts, from scratch (runs are written to $1)"
    stage sft "$1/facts" --model "$TINY/model" --from-scratch --data "$TINY/facts.jsonl" $small \
        --lr 2e-3 --batch 8 --epochs 12 --micro-tokens 6000
    echo "== SFT 2: single lines of searches"
    stage sft "$1/steps" --model "$1/facts/model" --data "$TINY/steps.jsonl" $small \
        --lr 2e-3 --batch 16 --epochs 8 --micro-tokens 6000
    echo "== SFT 3: demonstrations, most of them short guesses, some of them searches"
    stage sft "$1/sft" --model "$1/steps/model" --data "$2" $small \
        --lr 1e-3 --batch 32 --epochs 3 --micro-tokens 2500
}

# PPO from the SFT model $1 into the run $2; further arguments go to rlsp.py.
tiny_ppo() {
    stage ppo "$2" --model "$1" --data "$TINY/train.jsonl" --dtype float32 --no-recompute --seed "$SEED" \
        --steps 40 --rollout-batch 96 --train-batch 24 --max-response 400 --slots 96 --micro-tokens 2500 --save-every 0 \
        --temperature 1 --exploration length --length-scale 8 --length-floor 0.5 --kl-coef 0.02 \
        --lr 3e-4 --critic-lr 1e-3 --adam-eps 1e-5 --freeze-steps 2 "${@:3}"
}

tiny_eval() {
    stage eval "$1" --data "$TINY/test.jsonl" --dtype float32 --seed "$SEED" \
        --temperature 1 --max-response 400 --slots 240 "${@:2}"
}

tiny() {
    local started=$SECONDS
    RUN=${RUN:-runs/tiny-$(date +%Y%m%d-%H%M%S)}
    tiny_sft "$RUN" "$TINY/sft.jsonl"
    echo "== PPO: outcome verifier and exploration reward"
    tiny_ppo "$RUN/sft/model" "$RUN/ppo" "$@"
    echo "== Held-out problems, before and after PPO"
    tiny_eval "$RUN/eval" --model "$RUN/sft/model" "$RUN/ppo/model"
    run "$python" "$HERE/rlsp.py" report "$RUN/sft" "$RUN/ppo" "$RUN/eval" --out "$RUN/report.html"
    echo "train.sh: done in $((SECONDS - started)) s"
}

SEED=${SEED:-0}
setup
launch=("$python")
case "${1:-}" in
    setup) ;;
    test) shift; setup_tests; cd "$HERE"; exec "$python" -m pytest "$@" ;;
    experiment) . "$HERE/docs/results/experiment.sh"; experiment ;;
    gsm8k) . "$HERE/docs/results/experiment.sh"; . "$HERE/docs/results/gsm8k.sh"; gsm8k ;;
    *) if [ -n "${MODEL:-}" ]; then large "$@"; else tiny "$@"; fi ;;
esac
