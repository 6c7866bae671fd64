# The commands of `bash train.sh experiment`, which reads this file after defining tiny_sft, tiny_ppo and tiny_eval.

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
