#!/usr/bin/env bash
# The published runs (paper section 3 and appendix G): SFT on oracle traces, then GRPO; or GRPO alone for models
# that already reason. On 1, 2 and 4 nodes of 8 cards for 7b, 14b and 32b.
#
#   launch/rm-r1.sh 7b sft && launch/rm-r1.sh 7b grpo           one node
#   launch/rm-r1.sh 7b reasoning                                DeepSeek-R1-Distill-Qwen-7B, GRPO only
#   launch/rm-r1.sh 7b grpo --lora 32                           adapters, at ten times the rates
#   NODES=2 NODE=0 FIRST=node0 launch/rm-r1.sh 14b grpo         the same line on every node, with its number
#   sbatch --nodes 4 launch/rm-r1.sbatch 32b grpo               Slurm: finds all of it itself
#
# What follows the stage goes to the script: launch/rm-r1.sh 7b grpo --beta 0. GPUS is the number of cards a node. With
# --dry-run at the end nothing is trained: tools/dryrun.py says, on any machine, how much memory a card would hold,
# and what the run would cost where --card names one.
set -euo pipefail
cd "$(dirname "$0")/.."
SIZE=${1:?7b, 14b or 32b} STAGE=${2:?sft, grpo or reasoning}
shift 2

# Learning rates of the paper's appendix G; the released scripts differ from it for 14b and 32b. TP is the number of
# cards that one engine needs for its weights beside the trainer.
case $SIZE in
    7b)  NAME=7B  SFT_LR=5e-6 GRPO_LR=1e-6 REASONING_LR=1e-6 TP=1 NODES=${NODES:-1} ;;
    14b) NAME=14B SFT_LR=3e-6 GRPO_LR=7e-7 REASONING_LR=1e-6 TP=2 NODES=${NODES:-2} ;;
    32b) NAME=32B SFT_LR=2e-6 GRPO_LR=5e-7 REASONING_LR=8e-7 TP=4 NODES=${NODES:-4} ;;
    *) echo "error: $SIZE: the published sizes are 7b, 14b and 32b" >&2; exit 2 ;;
esac
# Adapters learn best at about ten times the rate of full training: 5e-6 becomes 5e-5. They have folders of their own.
tenfold() { echo "${1%-*}-$((${1##*-} - 1))"; }
case " $* " in
    *" --lora "[1-9]* | *" --lora="[1-9]*)
        SIZE=$SIZE-lora
        SFT_LR=$(tenfold $SFT_LR) GRPO_LR=$(tenfold $GRPO_LR) REASONING_LR=$(tenfold $REASONING_LR) ;;
esac
case $STAGE in
    sft) RUN=(sft.py --model "Qwen/Qwen2.5-$NAME-Instruct" --lr $SFT_LR --out "runs/sft-$SIZE") ;;
    grpo) RUN=(grpo.py --model "runs/sft-$SIZE/model" --lr $GRPO_LR --tp $TP --out "runs/grpo-$SIZE") ;;
    reasoning) RUN=(grpo.py --model "deepseek-ai/DeepSeek-R1-Distill-Qwen-$NAME" --protocol reasoning
                    --data gaotang/RM-R1-Reasoning-RLVR --lr $REASONING_LR --tp $TP --out "runs/reasoning-$SIZE") ;;
    *) echo "error: $STAGE: the stages are sft, grpo and reasoning" >&2; exit 2 ;;
esac

# Expandable segments: at 7B the card then holds 34 GiB instead of 40 (docs/memory.md).
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
if [ "${!#}" = --dry-run ]; then
    set -- "${@:1:$#-1}"
    exec ${PYTHON:-python} tools/dryrun.py "${RUN[0]}" --ranks $((NODES * ${GPUS:-8})) "${RUN[@]:1}" "$@"
fi
# A checkpoint of 32B takes longer than the 30 seconds that torchrun leaves between SIGTERM and SIGKILL.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec ${PYTHON:-python} -m torch.distributed.run --nnodes "$NODES" --node_rank "${NODE:-0}" --nproc_per_node "${GPUS:-8}" \
    --master_addr "${FIRST:-127.0.0.1}" --master_port "${PORT:-29500}" "${RUN[@]}" "$@"
