#!/usr/bin/env bash
# Tries the multi-process path on one machine: N processes of `sdpo train` on the CPU, over gloo.
#
#   launch/local_processes.sh configs/nano.toml --run-dir runs/two_processes
#   PROCESSES=4 launch/local_processes.sh configs/nano.toml ...
#   DRY_RUN=1 launch/local_processes.sh configs/nano.toml     prints the commands
#
# For testing, not for speed: the processes share the machine's cores. If one fails, the others are
# stopped, and its exit code is that of this script. Ctrl-C saves and stops, as with one process.
# Output of process i starts with [i].
#
#   PROCESSES   processes (2)
#   PORT        port of the coordinator on 127.0.0.1 (a free one)
#   SDPO        the command (sdpo)
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: launch/local_processes.sh RECIPE [--SECTION.KEY VALUE ...]" >&2
  exit 2
fi
processes=${PROCESSES:-2}
sdpo=${SDPO:-sdpo}
if ! [[ $processes =~ ^[1-9][0-9]*$ ]]; then
  echo "PROCESSES=$processes: expected a whole number of at least 1" >&2
  exit 2
fi
port=${PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

export JAX_PLATFORMS=cpu
export SDPO_COORDINATOR=127.0.0.1:$port
export SDPO_NUM_PROCESSES=$processes

if [ "${DRY_RUN:-0}" != 0 ]; then
  for ((i = 0; i < processes; i++)); do
    printf '%s ' JAX_PLATFORMS=cpu "SDPO_COORDINATOR=$SDPO_COORDINATOR" \
      "SDPO_NUM_PROCESSES=$processes" "SDPO_PROCESS_ID=$i"
    printf '%q ' "$sdpo" train "$@"
    printf '\n'
  done
  exit 0
fi

pids=()
stop() { kill -s "$1" "${pids[@]}" 2>/dev/null || true; }
# Background jobs of a script ignore SIGINT: pass it on as SIGTERM, which saves and stops likewise.
trap 'stop TERM' INT TERM
trap 'stop KILL' EXIT

for ((i = 0; i < processes; i++)); do
  SDPO_PROCESS_ID=$i "$sdpo" train "$@" > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done

left=("${pids[@]}")
while [ ${#left[@]} -gt 0 ]; do
  code=0
  wait -n -p ended "${left[@]}" || code=$?
  if [ -z "${ended:-}" ]; then # a signal came; the processes are saving
    continue
  fi
  if [ "$code" -ne 0 ]; then
    echo "a process of the run ended with code $code; stopping the others" >&2
    exit "$code"
  fi
  rest=()
  for pid in "${left[@]}"; do
    if [ "$pid" != "$ended" ]; then rest+=("$pid"); fi
  done
  left=("${rest[@]}")
done
trap - EXIT
