#!/usr/bin/env bash
# Starts one command as N processes on this node, each with one GPU where there are GPUs, and joins them into one run.
#
#   scripts/launch_node.sh 4 python -m jvitmoe.train --config configs/cifar10_random.py
#   RESTARTS=3 scripts/launch_node.sh 4 python -m jvitmoe.train --config configs/cifar10_random.py
#
# SIGTERM, SIGINT and SIGHUP go to all of them. When one fails, so do the others, and all start again if RESTARTS allows
# it: not after a signal, nor if all end for an error that the user must correct (code 2). The first failure's code is
# returned.
set -uo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 PROCESSES COMMAND [FLAGS]" >&2
    exit 2
fi
processes=$1
shift
dying=() # with Linux's setpriv, processes get SIGTERM too when this script is killed
if setpriv --pdeathsig TERM true 2>/dev/null; then dying=(setpriv --pdeathsig TERM); fi
children=()
signals=0 told=0
# Children have sessions of their own: Ctrl-C reaches this script only, which passes it on as SIGTERM, because bash starts
# children with SIGINT ignored. The loop passes it on and not the trap, which may run before a new child is in `children`.
trap 'signals=$((signals + 1))' TERM INT HUP
for ((attempt = 1; ; attempt++)); do
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')
    children=()
    for ((i = 0; i < processes && !signals; i++)); do
        JAX_LOCAL_DEVICE_IDS=$i setsid ${dying[@]+"${dying[@]}"} "$@" --coordinator="localhost:$port" --processes="$processes" --process="$i" &
        children+=($!)
    done
    code=$((signals && ${#children[@]} == 0 ? 143 : 0)) # a signal may come before there is a process
    restart=0
    while ((${#children[@]})); do
        for (( ; told < signals; told++)); do kill -TERM "${children[@]}" 2>/dev/null; done
        running=()
        for child in "${children[@]}"; do
            if kill -0 "$child" 2>/dev/null; then
                running+=("$child")
                continue
            fi
            wait "$child"
            found=$?
            if ((code == 0)); then code=$found failed=$SECONDS; fi
            if ((found != 2)); then restart=1; fi
        done
        children=(${running[@]+"${running[@]}"})
        if ((code && ${#children[@]} && SECONDS - failed > 40)); then # by now all have ended that are not frozen
            kill -KILL "${children[@]}"
        fi
        sleep 0.2
    done
    if ((code == 0 || restart == 0 || signals || attempt > ${RESTARTS:-0})); then exit "$code"; fi
    echo "a process ended with code $code; all start again ($attempt of $RESTARTS restarts)" >&2
done
