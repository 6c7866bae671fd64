# A real model on real problems. `MODEL=folder bash train.sh gsm8k` reads this file: SFT, then for each seed PPO
# with and without an exploration reward, then the test problems. Finished stages are kept, and a stage that was
# stopped continues.
#   SETTING     gsm8k, with GSM8K=folder of its files; or sums, for slow machines: short problems, which the
#               package reasoning-gym makes
#   ARMS        "none length"; also steps and group
#   SEEDS, STEPS, EPOCHS (of SFT), SFT_FLAGS, PPO_FLAGS (the later ones count)
gsm8k() {
    local arm words steps batch response length epochs=${EPOCHS:-3} sft_flags=() ppo_flags=()
    if [ -z "${MODEL:-}" ]; then die "gsm8k: give MODEL=folder of a model such as SmolLM2-135M-Instruct"; fi
    SETTING=${SETTING:-gsm8k}
    RUN=${RUN:-runs/$SETTING}
    case $SETTING in
        gsm8k)
            if [ -z "${GSM8K:-}" ]; then
                die "gsm8k: give GSM8K=folder with train.jsonl and test.jsonl, or SETTING=sums"
            fi
            steps=${STEPS:-60} batch=64 response=256 length=50
            sft_flags=(--batch 32 --lr 1e-4 --save-every 50 --max-tokens 1024 --drop-long --micro-tokens 3000)
            ppo_flags=(--train-batch 32 --lr 2e-6 --critic-lr 1e-5 --kl-coef 0.02 --freeze-steps 3
                       --micro-tokens 3000 --save-every 5 --eval-every 10) ;;
        sums)
            steps=${STEPS:-12} batch=48 response=96 length=10
            sft_flags=(--prompt '{problem}' --batch 16 --lr 2e-4 --save-every 15 --max-tokens 256
                       --micro-tokens 1000)
            # so few steps leave the critic weak, and of a reward lambda 0.95 would bring 0.95^40 = 0.13 to the
            # first of 40 tokens
            ppo_flags=(--train-batch 16 --lr 3e-5 --critic-lr 1e-4 --lam 1 --kl-coef 0.01 --freeze-steps 1
                       --micro-tokens 1000 --save-every 3 --keep 1 --eval-every 4) ;;
        *) die "SETTING is $SETTING, expected gsm8k or sums" ;;
    esac
    words=(); split SFT_FLAGS; sft_flags+=(${words[@]+"${words[@]}"})
    words=(); split PPO_FLAGS; ppo_flags+=(--steps "$steps" ${words[@]+"${words[@]}"})
    finished "$RUN/data" gsm8k_data
    run "$python" "$HERE/docs/results/gsm8k_cost.py" hours "$RUN/data" --model "$MODEL" \
        --epochs "$epochs" --steps "$steps" --batch "$batch"
    stage sft "$RUN/sft" --model "$MODEL" --data "$RUN/data/sft.jsonl" \
        --epochs "$epochs" --no-recompute "${sft_flags[@]}"
    gsm8k_test "$RUN/sft-test" "$RUN/sft/model"
    for SEED in ${SEEDS:-0 1 2}; do
        for arm in ${ARMS:-none length}; do
            gsm8k_arm "$arm" "$RUN/seed-$SEED/$arm" "${ppo_flags[@]}"
            gsm8k_test "$RUN/seed-$SEED/$arm-test" "$RUN/seed-$SEED/$arm/model"
        done
    done
    run "$python" "$HERE/docs/results/gsm8k_table.py" "$RUN"
}

gsm8k_data() {
    if [ "$SETTING" = sums ]; then
        run "$python" "$HERE/docs/results/gsm8k.py" sums "$1"
    else
        run "$python" "$HERE/docs/results/gsm8k.py" data "$GSM8K" "$1"
    fi
}

# PPO of the arm $1 into $2. Each arm samples the same number of responses per step.
gsm8k_arm() {
    local flags
    case $1 in
        none) flags=(--exploration none) ;;
        length) flags=(--exploration length --length-scale "$length" --length-floor 1) ;;
        steps) flags=(--exploration steps --steps-scale 8) ;;
        group) flags=(--exploration none --advantage group --samples 4 --rollout-batch $((batch / 4))) ;;
        *) die "ARMS has $1, expected none, length, steps or group" ;;
    esac
    echo "== seed $SEED, $1"
    stage ppo "$2" --model "$RUN/sft/model" --data "$RUN/data/train.jsonl" --seed "$SEED" \
        --max-response "$response" --temperature 1 --no-recompute --eval-data "$RUN/data/validation.jsonl" \
        --rollout-batch "$batch" "${flags[@]}" "${@:3}"
}

# The test problems: four samples at the temperature of training, and greedy.
gsm8k_test() {
    local flags=(--model "$2" --data "$RUN/data/test.jsonl" --max-response "$response")
    mkdir -p "$1"
    stage eval "$1/sampled" "${flags[@]}" --samples 4 --temperature 1
    stage eval "$1/greedy" "${flags[@]}" --temperature 0
}
