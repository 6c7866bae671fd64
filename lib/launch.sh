# PPO on a Hugging Face model, `MODEL=folder DATA=file bash train.sh`: on one process, through torchrun on all GPUs of one node or of
# several, or inside a job that torchrun has started. train.sh reads this file.

# A stage inside a job of torchrun: each stage's process group meets at a port of its own, the last one's may still be closing.
joined() {
    MASTER_PORT=$((MASTER_PORT + 1)) TORCHELASTIC_USE_AGENT_STORE=False python "$@"
    MASTER_PORT=$((MASTER_PORT + 1))
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
