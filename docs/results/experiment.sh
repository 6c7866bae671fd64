# The paper's comparison. `bash train.sh experiment` reads this file: for each seed it trains one SFT model, then
# PPO from it with each exploration reward, and evaluates them on held-out problems. Finished stages are kept, and
# a stage that was stopped continues.
experiment() {
    local arm arms
    SETTING=${SETTING:-main}
    RUN=${RUN:-runs/experiment-$SETTING}
    case $SETTING in
        main) arms="none length steps anneal only" ;;
        rare) arms="none length steps anneal" ;;
        hacking) arms="unguarded guarded" ;;
        *) die "SETTING is $SETTING, expected main, rare or hacking" ;;
    esac
    for SEED in ${SEEDS:-0 1 2 3 4}; do
        finished "$RUN/seed-$SEED/start" start
        for arm in ${ARMS:-$arms}; do
            finished "$RUN/seed-$SEED/$arm" arm "$arm"
        done
    done
    run "$python" "$HERE/docs/results/experiment.py" "$RUN" --figure "$RUN/figure.svg"
    run "$python" "$HERE/rlsp.py" report "$RUN"/seed-*/*/ppo "$RUN"/seed-*/*/eval --out "$RUN/report.html"
}

# Make the folder $1 with the command that follows. It has another name until it is complete.
finished() {
    if [ -d "$1" ]; then return; fi
    "${@:2:1}" "$1.part" "${@:3}"
    mv "$1.part" "$1"
}

start() {
    local demonstrations=$TINY/sft.jsonl
    if [ "$SETTING" = rare ]; then  # the same problems; 10 % of the demonstrations search instead of 20 %
        run "$python" "$HERE/data/generate.py" --out "$1/data" --direct 0.66 --partial 0.24 --search 0.06
        demonstrations=$1/data/sft.jsonl
    fi
    tiny_sft "$1" "$demonstrations"
    # eight short samples: a majority vote that costs what one long response costs
    tiny_eval "$1/eval" --samples 8 --model "$1/sft/model"
}

arm() {
    local flags
    case $2 in
        none) flags=(--exploration none) ;;
        length) flags=(--exploration length) ;;
        steps) flags=(--exploration steps --steps-scale 10) ;;
        anneal) flags=(--alpha-end 1) ;;  # the length reward fades out
        only) flags=(--alpha 0) ;;  # the length reward without any outcome
        *guarded) flags=(--steps 30 --exploration none --reward "$HERE/docs/results/hacking.py:$2") ;;
        *) die "ARMS has $2, expected none, length, steps, anneal or only; for SETTING=hacking unguarded or guarded" ;;
    esac
    echo "== seed $SEED, $2"
    tiny_ppo "$RUN/seed-$SEED/start/sft/model" "$1/ppo" "${flags[@]}"
    tiny_eval "$1/eval" --samples 4 --model "$1/ppo/model"
}
