#!/usr/bin/env bash
# A published setting from the data to its FID, on one GPU, eight, or several nodes of eight.
#
#     bash examples/published.sh cifar10                 # all GPUs of this machine, D = 2048
#     D=inf GPUS=1 bash examples/published.sh cifar10    # diffusion, on one GPU
#     D=128 bash examples/published.sh ffhq
#     NODES=2 HOST=node0:29400 bash examples/published.sh imagenet   # the same on both nodes
#     ECHO=1 bash examples/published.sh afhqv2           # only print the commands
#     TRAIN="--precision=bf16" SAMPLE="--solver=ipndm" bash examples/published.sh cifar10
#
# TRAIN holds more flags for training, SAMPLE for sampling and SCORE for scoring. After a stop or a
# crash, run it again: every step continues where it was. First put the archive where the table below
# looks for it, or name it by SOURCE (docs/data.md says where the archives come from). Paths are
# relative to the repository.
set -euo pipefail -o noglob
cd "$(dirname "$0")/.."

[ $# = 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2; exit 2; }
WHAT=$1
TRAIN=${TRAIN:-} SAMPLE=${SAMPLE:-} SCORE=${SCORE:-}
D=${D:-2048} NODES=${NODES:-1} RUNS=${RUNS:-runs} SEEDS=${SEEDS:-0-49999}
GPUS=${GPUS:-$( (nvidia-smi -L 2>/dev/null || echo one) | wc -l)}

case $WHAT in
    cifar10)      PRESET=cifar10-ncsnpp STEPS=18 SIZE=32 FROM=downloads/cifar10/cifar-10-python.tar.gz ;;
    cifar10-cond) PRESET=cifar10-cond   STEPS=18 SIZE=32 FROM=downloads/cifar10/cifar-10-python.tar.gz ;;
    ffhq)         PRESET=ffhq64-ddpmpp  STEPS=40 SIZE=64 FROM=downloads/ffhq/images1024x1024 ;;
    afhqv2)       PRESET=afhqv2-64      STEPS=40 SIZE=64 FROM=downloads/afhqv2 ;;
    imagenet)     PRESET=imagenet64-adm STEPS=256 SIZE=64 FROM=downloads/imagenet/ILSVRC/Data/CLS-LOC/train ;;
    *) echo "$WHAT: must be cifar10, cifar10-cond, ffhq, afhqv2 or imagenet" >&2; exit 2 ;;
esac
SOURCE=${SOURCE:-$FROM} DATA=${DATA:-datasets/${WHAT%-cond}-${SIZE}x$SIZE.zip} NAME=$WHAT-$D
[[ $D =~ ^([0-9]+([.][0-9]+)?|inf)$ ]] || { echo "D=$D: must be a number above 0, or inf" >&2; exit 2; }
NOISE="--pfgmpp=1 --aug_dim=$D"; [ "$D" = inf ] && NOISE=--pfgmpp=0
RESIZE=; [ "$SIZE" = 64 ] && RESIZE="--resolution=64x64"
[ "$WHAT" = imagenet ] && RESIZE="$RESIZE --transform=center-crop"
CHURN=; [ "$WHAT" = imagenet ] && CHURN="--S_churn=40 --S_min=0.05 --S_max=50 --S_noise=1.003"
if [ "$NODES" = 1 ]; then
    LAUNCH="torchrun --standalone --nproc_per_node=$GPUS"
else
    LAUNCH="torchrun --nnodes=$NODES --nproc_per_node=$GPUS --rdzv-id=$NAME --rdzv-backend=c10d"
    LAUNCH="$LAUNCH --rdzv-endpoint=${HOST:?name the first node, as HOST=node0:29400}"
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # so that nodes can come back: docs/cluster.md
fi
run() { echo "\$$(printf ' %q' "$@")"; [ -n "${ECHO:-}" ] || "$@"; }

# 1. The data set, made once. With several nodes, make it on one of them first.
[ -e "$DATA" ] || run python dataset_tool.py --source="$SOURCE" --dest="$DATA" $RESIZE
# 2. Training. It stops at once if it is finished. With --dump=10, a crash loses at most ten ticks.
run $LAUNCH --max-restarts=3 train.py --preset=$PRESET --outdir="$RUNS" --name="$NAME" \
    --data="$DATA" $NOISE --dump=10 --keep=3 --resume=auto $TRAIN
# 3. Three scores of 50,000 images each. Recorded scores are not computed again.
run $LAUNCH fid.py gen --network="$RUNS/$NAME" --ref="$DATA" --seeds="$SEEDS" --ranges=3 \
    --steps=$STEPS $CHURN $SAMPLE $SCORE
# 4. Pictures to look at. With several nodes, run the printed command on one of them.
[ "$NODES" = 1 ] || ECHO=1
run python generate.py --network="$RUNS/$NAME" --outdir="$RUNS/$NAME/pictures" --seeds=0-63 \
    --save_images --steps=$STEPS $CHURN $SAMPLE
