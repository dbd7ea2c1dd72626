#!/usr/bin/env bash
# The same `sdpo train RECIPE` on every worker of a TPU VM, over `gcloud compute tpus tpu-vm ssh`.
#
#   export TPU_NAME=my-tpu ZONE=us-central2-b PROJECT=my-project
#   launch/tpu_vm.sh install
#   launch/tpu_vm.sh run configs/nano.toml --run-dir /mnt/shared/runs/nano
#   launch/tpu_vm.sh fetch /mnt/shared/runs/nano
#   DRY_RUN=1 launch/tpu_vm.sh ...                 prints the commands
#
# Warnings
#   * The VM costs money until you delete it; this script neither creates nor deletes one.
#   * Google has ended development of the Cloud TPU API behind these commands: it serves v4 to v6e, not TPU7x.
#   * --run-dir must lie on a file system that all workers have mounted (Filestore, or a bucket through
#     Cloud Storage FUSE whose renames are atomic). A local folder holds one worker's share of a checkpoint.
#   * `install` copies this checkout over ~/sdpo-jax on every worker.
#   * `run` ends with the connection: start it in tmux. The same command goes on from the last checkpoint.
#   * For several workers run `ssh-add ~/.ssh/google_compute_engine` once before.
set -euo pipefail

usage() {
  echo "usage: launch/tpu_vm.sh install | run RECIPE [--SECTION.KEY VALUE ...] | fetch RUN_DIR [TO]" >&2
  exit 2
}
[ $# -ge 1 ] || usage
: "${TPU_NAME:?the name of the TPU VM, as in TPU_NAME=my-tpu}"
: "${ZONE:?its zone, as in ZONE=us-central2-b}"
: "${PROJECT:?its Google Cloud project, as in PROJECT=my-project}"

place=(--zone="$ZONE" --project="$PROJECT")
call() {
  if [ "${DRY_RUN:-0}" != 0 ]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}
on_every_worker() { call gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" --worker=all --command="$1"; }
copy() { call gcloud compute tpus tpu-vm scp "$@" "${place[@]}"; }

step=$1
shift
case $step in
  install)
    [ $# -eq 0 ] || usage
    cd "$(dirname "$0")/.."
    archive=$(mktemp -d)/sdpo-jax.tar.gz
    trap 'rm -r "$(dirname "$archive")"' EXIT
    call git archive --format=tar.gz --output="$archive" HEAD
    copy "$archive" "$TPU_NAME:sdpo-jax.tar.gz" --worker=all
    on_every_worker "set -e; mkdir -p sdpo-jax; tar -xzf sdpo-jax.tar.gz -C sdpo-jax; cd sdpo-jax; \
python3 -m venv .venv; .venv/bin/python -m pip install -q -e '.[train,tpu]'"
    ;;
  run)
    [ $# -ge 1 ] || usage
    # `auto`: JAX asks the VM's metadata for the other workers. One worker is a run of one process.
    on_every_worker "cd sdpo-jax && SDPO_COORDINATOR=auto .venv/bin/sdpo train $(printf '%q ' "$@")"
    ;;
  fetch)
    [ $# -ge 1 ] && [ $# -le 2 ] || usage
    copy --recurse "$TPU_NAME:$1" "${2:-.}" --worker=0
    ;;
  *) usage ;;
esac
