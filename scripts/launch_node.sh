#!/usr/bin/env bash
# Starts one command as N processes on this node, each with one GPU where there are GPUs, and joins them into one run.
#
#   scripts/launch_node.sh 4 python -m jvitmoe.train --config configs/cifar10_random.py
#
# SIGTERM, SIGINT and SIGHUP go to all of them. When one fails, so do the others; the first failure's code is returned.
set -uo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 PROCESSES COMMAND [FLAGS]" >&2
    exit 2
fi
processes=$1
shift
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
children=()
stopped=0
# Children have sessions of their own: Ctrl-C reaches this script only, which passes it on once. It passes SIGTERM on,
# because bash starts children with SIGINT ignored.
trap 'stopped=1; kill -TERM ${children[@]+"${children[@]}"} 2>/dev/null' TERM INT HUP
for ((i = 0; i < processes && !stopped; i++)); do
    JAX_LOCAL_DEVICE_IDS=$i setsid "$@" --coordinator="localhost:$port" --processes="$processes" --process="$i" &
    children+=($!)
done
code=0
for child in "${children[@]}"; do
    wait "$child"
    found=$?
    while kill -0 "$child" 2>/dev/null; do # a trapped signal ends the waiting, not the child
        wait "$child"
        found=$?
    done
    if ((code == 0)); then code=$found; fi
done
exit "$code"
