#!/usr/bin/env bash
# What the other scripts run on each host of a slice.
#
#   on_host.sh setup            make ~/step_grpo_venv and install this checkout into it
#   on_host.sh start ARGS...    python -m step_grpo.main ARGS..., outliving this session; its output goes to a file
#   on_host.sh restart ARGS...  the same, after the end of a run that is still there
#   on_host.sh stop             end the run
#   on_host.sh state [ARGS...]  step_grpo_state=absent, running, exit:CODE, or lost (it ended without a word);
#                               with ARGS, the end of a run of other arguments counts as absent
#   on_host.sh logs LINES       the end of the output; `follow LINES` goes on with what comes

set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$HOME/step_grpo_venv
files=$HOME/step_grpo_run # pid, exit, log, line
patience=120              # seconds that a run has for saving what is done

# The image's Python is older than step_grpo needs; uv brings one.
setup() {
    python3 -m pip install --quiet --user --upgrade uv
    [[ -x $venv/bin/python ]] || "$HOME/.local/bin/uv" venv --quiet --seed --python=3.12 "$venv"
    "$venv/bin/pip" install --quiet "${root}[tpu,gcs]"
}

# After a reboot the number may be another process's, so its command line must be ours.
running() {
    [[ -f $files/pid ]] && grep -qs step_grpo_run "/proc/$(cat "$files/pid")/cmdline"
}

start() {
    if running; then
        echo "a run is still there; --restart ends it first" >&2
        exit 1
    fi
    mkdir -p "$files"
    rm -f "$files/exit"
    printf '%s\0' "$@" >"$files/line"
    printf '=== %s %s\n' "$(date -u +%FT%TZ)" "$*" >>"$files/log"
    # In a session of its own: the end of ssh does not reach it, and one signal reaches all of it.
    # shellcheck disable=SC2016  # for the inner shell
    setsid bash -c 'cd "$1" || exit; shift; "$@"; echo $? >"$0/exit"' \
        "$files" "$root" "$venv/bin/python" -u -m step_grpo.main "$@" >>"$files/log" 2>&1 </dev/null &
    echo $! >"$files/pid"
}

stop() {
    local group
    running || return 0
    group=$(cat "$files/pid")
    kill -TERM -- "-$group" 2>/dev/null || return 0
    gone "$group" "$patience" && return
    kill -KILL -- "-$group" 2>/dev/null || return 0
    gone "$group" 10 || echo "the run does not end" >&2
}

# gone GROUP SECONDS: waits so long at most for the end of all its processes.
gone() {
    for _ in $(seq $(($2 * 10))); do
        kill -0 -- "-$1" 2>/dev/null || return 0
        sleep 0.1
    done
    return 1
}

state() {
    if running; then
        echo running
    elif (($#)) && ! printf '%s\0' "$@" | cmp -s - "$files/line"; then
        echo absent
    elif [[ -f $files/exit ]]; then
        echo "exit:$(cat "$files/exit")"
    elif [[ -f $files/pid ]]; then
        echo lost
    else
        echo absent
    fi
}

action=${1:?an action is missing}
shift
case $action in
    setup) setup ;;
    start) start "$@" ;;
    restart)
        stop
        start "$@"
        ;;
    stop) stop ;;
    state) printf 'step_grpo_state=%s\n' "$(state "$@")" ;;
    logs) tail -n "$1" "$files/log" ;;
    follow) exec tail -n "$1" -F "$files/log" ;;
    *) echo "unknown action: $action" >&2 && exit 2 ;;
esac
