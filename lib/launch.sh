# How train.sh starts its stages: signals, stages, and the recipe for large models. train.sh reads this file.

die() { echo "train.sh: $1" >&2; exit "${2:-2}"; }

# A batch system may signal only this shell, and as process 1 of a container a shell without traps receives no
# signals. So every request to stop is passed on to the child, always as TERM, which rlsp.py, torchrun and pip all
# handle. (HUP or USR would end torchrun before its ranks.)
signals=0 caught='' child=''

forward() {
    signals=$((signals + 1))
    caught=$1
    if [ -n "$child" ]; then kill -TERM "$child" 2> /dev/null || true; fi
}

for name in TERM INT HUP USR1 USR2; do trap "forward $name" "$name"; done

# Run a command and return its exit status, whatever signals come meanwhile. After a signal nothing is started.
run() {
    local before status
    if [ -n "$caught" ]; then exit 75; fi
    "$@" < /dev/null &
    child=$!
    if [ -n "$caught" ]; then kill -TERM "$child"; fi  # the signal came before the child existed
    while true; do
        before=$signals
        status=0
        wait "$child" || status=$?
        if [ "$signals" = "$before" ]; then break; fi  # otherwise a signal may have ended the wait
    done
    child=''
    return "$status"
}

# Run rlsp.py $1 into the folder $2 with the arguments that follow. A run that exists is resumed, so that the same
# command can be given again, whatever stopped it (rlsp.py does nothing for a run that is done). $launch is the
# Python or torchrun that starts it.
stage() {
    local how=--out status=0
    # an evaluation is moved aside if the PPO run beside it has been made longer since
    if [ "$1.${NNODES:-1}.${RANK:-}" = eval.1. ] && [ -e "$2/config.json" ] \
            && [ "$(dirname "$2")/ppo/done" -nt "$2/config.json" ]; then
        mv "$2" "$2-before-$(date +%Y%m%d-%H%M%S)"
    fi
    if [ -e "$2/config.json" ]; then how=--resume; fi
    if [ -n "${RANK:-}" ]; then
        # each stage's process group gets its own port, since the last one's may still be closing
        export MASTER_PORT=$((MASTER_PORT + 1)) TORCHELASTIC_USE_AGENT_STORE=False
    else
        rm -f "$2/stopped"
    fi
    run "${launch[@]}" "$HERE/rlsp.py" "$1" $how "$2" "${@:3}" || status=$?
    if [ "$status" = 1 ] && [ -e "$2/stopped" ]; then status=75; fi  # torchrun turns every failure into 1
    if [ "$status" = 75 ]; then echo "train.sh: the same command with RUN=$RUN continues it" >&2; fi
    if [ "$status" != 0 ]; then exit "$status"; fi
}

# Add the words of the variable $1 to the array `words`. They are split as by a shell, with quotes, but nothing in
# them is expanded or run. Python writes all words and a dot, or says what is wrong.
split() {
    local word last
    while IFS= read -r -d '' word; do words+=("$word"); done < <("$python" -c '
import shlex, sys
try:
    sys.stdout.write("".join(word + chr(0) for word in [*shlex.split(sys.argv[2]), "."]))
except ValueError as e:
    sys.exit(f"train.sh: {sys.argv[1]} is {sys.argv[2]}: {e}")' "$1" "${!1:-}")
    last=$((${#words[@]} - 1))
    if [ "$last" -lt 0 ] || [ "${words[$last]}" != . ]; then exit 2; fi
    unset "words[$last]"
}

# SFT, PPO and evaluation of a Hugging Face model: on one process, through torchrun on all GPUs of one or several
# nodes, or inside a job of torchrun.
large() {
    local name n stamp file names=' ' words everywhere sft_flags ppo_flags eval_flags tests models=("$MODEL")
    if [ -z "${DATA:-}" ]; then die "MODEL is given, DATA (a jsonl file of problems) is not"; fi
    for name in MODEL DATA SFT_DATA; do
        if [ -n "${!name:-}" ] && ! [ -e "${!name}" ]; then die "$name is ${!name}: no such file"; fi
    done
    words=("${EVAL_DATA:-}")
    if ! [ -e "${EVAL_DATA:-}" ]; then words=(); split EVAL_DATA; fi
    tests=(${words[@]+"${words[@]}"})
    for file in ${tests[@]+"${tests[@]}"}; do
        name=$(basename "$file" .jsonl)
        if ! [ -e "$file" ]; then die "EVAL_DATA is $file: no such file"; fi
        case $names in *" $name "*) die "EVAL_DATA has two files called $name, expected a name for each result" ;; esac
        names="$names$name "
    done
    everywhere=(--seed "$SEED" ${SHARD_RANKS:+--shard-ranks "$SHARD_RANKS"})
    words=("${everywhere[@]}" --epochs 5 --batch 64 --lr 2e-5 --max-tokens 8192)  # the paper's values
    split SFT_FLAGS
    sft_flags=("${words[@]}")
    everywhere+=(${SAMPLER:+--sampler "$SAMPLER"})
    words=("${everywhere[@]}")
    split PPO_FLAGS
    ppo_flags=("${words[@]}" "$@")
    words=("${everywhere[@]}")
    split EVAL_FLAGS
    eval_flags=("${words[@]}")
    # the name must be the same on all ranks, whose clocks differ: inside torchrun the job's id replaces the time
    stamp=$(date +%Y%m%d-%H%M%S)
    if [ -n "${RANK:-}" ]; then stamp=$TORCHELASTIC_RUN_ID; fi
    if [ "${NNODES:-1}" -gt 1 ] && [ -z "${RANK:-}" ]; then stamp=none; fi
    if [ -z "${RUN:-}" ] && [ "$stamp" = none ]; then die "RUN is not given; expected the same folder on all nodes"; fi
    RUN=${RUN:-runs/$(basename "$MODEL")-$stamp}
    if [ -z "${RANK:-}" ]; then
        n=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
        if [ "${NNODES:-1}" -gt 1 ]; then
            [ -n "${RDZV:-}" ] || die "NNODES is given, RDZV (host:port of node 0, the same on all nodes) is not"
            [ -n "${NODE_RANK:-}" ] || die "NNODES is given, NODE_RANK (0 to NNODES - 1) is not"
            through_torchrun --nnodes "$NNODES" --node_rank "$NODE_RANK" \
                --master_addr "${RDZV%:*}" --master_port "${RDZV##*:}" --nproc_per_node "$n"
        elif [ "$n" -gt 1 ]; then
            through_torchrun --standalone --nproc_per_node "$n"
        fi
    fi
    if [ -n "${SFT_DATA:-}" ]; then
        stage sft "$RUN/sft" --model "$MODEL" --data "$SFT_DATA" "${sft_flags[@]}"
        models+=("$RUN/sft/model")
    fi
    stage ppo "$RUN/ppo" --model "${models[${#models[@]} - 1]}" --data "$DATA" "${ppo_flags[@]}"
    models+=("$RUN/ppo/model")
    for file in ${tests[@]+"${tests[@]}"}; do
        name=eval
        if [ "${#tests[@]}" -gt 1 ]; then name=eval-$(basename "$file" .jsonl); fi
        stage eval "$RUN/$name" --model "${models[@]}" --data "$file" "${eval_flags[@]}"
    done
}

# Start torchrun in a process group of its own, so that it receives a Ctrl-C only once, from this shell; a second
# one would end its wait for the ranks.
through_torchrun() {
    local own_group='import os, sys; os.setpgid(0, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
    # by default torchrun kills its ranks 30 s after it has passed on a signal; a checkpoint of 8B may take longer
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
    launch=("$python" -c "$own_group" -m torch.distributed.run "$@")
}
