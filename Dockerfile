# Build:  docker build --tag pfgmpp .
#
# Run on all GPUs; data sets, runs and caches live in the mounted working directory:
#
#   docker run --rm --gpus all --ipc=host --user "$(id -u):$(id -g)" \
#       -v "$PWD":/scratch -w /scratch -e PFGMPP_CACHE_DIR=/scratch/cache pfgmpp \
#       torchrun --standalone --nproc_per_node=8 /workspace/train.py --outdir=runs --name=cifar10-2048 \
#       --data=datasets/cifar10-32x32.zip --arch=ncsnpp --pfgmpp=1 --aug_dim=2048 --resume=auto
#
# --ipc=host: the processes of one machine exchange data through shared memory.

# The wheel of torch 2.13.0 on PyPI brings its own CUDA 13.0 libraries; the base image gives the
# driver interface of the same version and asks for a driver that has it (580 or newer).
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PATH=/opt/venv/bin:$PATH

RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 2000 pfgmpp

# Requirements before code: changing the code does not install torch again.
COPY requirements.txt /tmp/requirements.txt
RUN python3 -m venv /opt/venv \
    && pip install --requirement /tmp/requirements.txt \
    && python -c "import torch; assert torch.version.cuda.startswith('13.0'), torch.version.cuda"

COPY . /workspace
WORKDIR /workspace
USER 2000:2000

CMD ["python", "train.py", "--help"]
