# A real model on GSM8K, `MODEL=folder GSM8K=folder bash train.sh gsm8k`, which reads this file: SFT, from it PPO with and without
# an exploration reward for each seed, then the test problems. Whatever is finished is kept, and a stage that was stopped goes on.
# ARMS ("none length", also steps and group), SEEDS ("0 1 2"), STEPS (60), EPOCHS (3); SFT_FLAGS and PPO_FLAGS come last.
gsm8k() {
    local arm words results=$HERE/docs/results/gsm8k.py steps=${STEPS:-60} epochs=${EPOCHS:-3} sft_flags=() ppo_flags=()
    if [ -z "${MODEL:-}" ] || [ -z "${GSM8K:-}" ]; then
        die "gsm8k: give MODEL=folder of a model such as SmolLM2-135M-Instruct, and GSM8K=folder with train.jsonl and test.jsonl"
    fi
    RUN=${RUN:-runs/gsm8k}
    words=(); split SFT_FLAGS; sft_flags=(${words[@]+"${words[@]}"})
    words=(); split PPO_FLAGS; ppo_flags=(${words[@]+"${words[@]}"})
    finished "$RUN/data" gsm8k_data
    run "$python" "$results" hours "$RUN/data" --model "$MODEL" --steps "$steps" --epochs "$epochs"
    stage sft "$RUN/sft" --model "$MODEL" --data "$RUN/data/sft.jsonl" --epochs "$epochs" --batch 32 --lr 1e-4 --save-every 50 \
        --max-tokens 1024 --drop-long --micro-tokens 3000 --no-recompute ${sft_flags[@]+"${sft_flags[@]}"}
    gsm8k_test "$RUN/sft-test" "$RUN/sft/model"
    for SEED in ${SEEDS:-0 1 2}; do
        for arm in ${ARMS:-none length}; do
            gsm8k_arm "$arm" "$RUN/seed-$SEED/$arm" --steps "$steps" ${ppo_flags[@]+"${ppo_flags[@]}"}
            gsm8k_test "$RUN/seed-$SEED/$arm-test" "$RUN/seed-$SEED/$arm/model"
        done
    done
    run "$python" "$results" table "$RUN"
}

gsm8k_data() { run "$python" "$HERE/docs/results/gsm8k.py" data "$GSM8K" "$1"; }

# PPO of the arm $1 into $2. Each arm samples the same number of responses per step.
gsm8k_arm() {
    local flags
    case $1 in
        none) flags=(--exploration none --rollout-batch 64) ;;
        length) flags=(--exploration length --length-scale 50 --length-floor 1 --rollout-batch 64) ;;
        steps) flags=(--exploration steps --steps-scale 8 --rollout-batch 64) ;;
        group) flags=(--exploration none --advantage group --samples 4 --rollout-batch 16) ;;
        *) die "ARMS has $1, expected none, length, steps or group" ;;
    esac
    echo "== seed $SEED, $1"
    stage ppo "$2" --model "$RUN/sft/model" --data "$RUN/data/train.jsonl" --seed "$SEED" --train-batch 32 --max-response 256 \
        --temperature 1 --lr 2e-6 --critic-lr 1e-5 --kl-coef 0.02 --freeze-steps 3 --micro-tokens 3000 --no-recompute --save-every 5 \
        --eval-data "$RUN/data/validation.jsonl" --eval-every 10 "${flags[@]}" "${@:3}"
}

# The test problems: four samples at the temperature of training, and greedy.
gsm8k_test() {
    mkdir -p "$1"
    stage eval "$1/sampled" --model "$2" --data "$RUN/data/test.jsonl" --samples 4 --temperature 1 --max-response 256
    stage eval "$1/greedy" --model "$2" --data "$RUN/data/test.jsonl" --temperature 0 --max-response 256
}
