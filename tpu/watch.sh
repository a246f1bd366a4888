#!/usr/bin/env bash
# Keeps a run going on a slice that may be taken away: creates it, sets it up, launches the line, and does so again
# whenever the slice is preempted or the program breaks off, until the line has come to its end.
#
#   tpu/watch.sh --name=NAME --zone=ZONE --accelerator=TYPE [--spot] \
#       --config=FILE --workdir=gs://BUCKET/FOLDER [--config.FIELD=VALUE ...]
#
#   all flags of create.sh, and:
#   --poll=60              seconds between two looks
#   --max-preemptions=100  slices that are created again, and stopped runs that are launched again, at most
#   --max-crashes=10       launches again on a slice that is there, at most
#   --backoff=30           seconds before the first new try; doubled each time until the run is seen running, at
#                          most 15 minutes
#   --delete-when-done     delete the slice once the line has come to its end
#   --dry-run              print the commands, run nothing
#
# It runs on any machine with gcloud and may itself be stopped and started again; the commit that is checked out
# when it starts is the one that it installs to its end. A run that was asked to stop (a signal, a notice of
# maintenance) also exits with 0, so the line has come to its end where the workdir holds its result.json; else it is
# launched again, as after a preemption. What ended on the hosts before with other arguments counts for nothing.
# Exit 0: the line has come to its end. Exit 1: it gave up and says why; the slice, if there is one, is left for a
# look and costs money. A mistake in the settings (the program's exit code 2) is not tried again; what may be well
# later (75: a bucket, the network, a disk, another host) is, like a crash.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

slice_flags="name zone project"
create_flags="accelerator runtime-version valid-until service-account"
parse_flags "$slice_flags $create_flags spot? program poll max-preemptions max-crashes backoff delete-when-done?" "$@"
check_slice
check_program
for number in poll max-preemptions max-crashes backoff; do check "$number" '0|[1-9][0-9]*' 'a whole number'; done

readonly MAX_DELAY=900 MAX_SILENCE=10
commit=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo HEAD)

say() {
    printf '%s %s\n' "$(date -u +%FT%TZ)" "$1" >&2
}

give_up() {
    say "gave up: $1; the slice, if it is there, still costs money (tpu/delete.sh)"
    exit 1
}

# script NAME FLAGS ARGS...: calls a script of this folder with those of the flags that were given.
script() {
    local name=$1 flags=$2 key words=()
    shift 2
    for key in $flags; do
        if [[ -n $(flag "$key") ]]; then words+=("--$key=$(flag "$key")"); fi
    done
    if [[ -n $dry_run ]]; then words+=(--dry-run); fi
    "$here/$name" "${words[@]}" "$@"
}

create() {
    script create.sh "$slice_flags $create_flags" ${flag_spot:+--spot}
}

launch() {
    script launch.sh "$slice_flags" --restart "${program[@]}"
}

set_up_and_launch() {
    script setup.sh "$slice_flags" "--commit=$commit" && launch
}

describe() {
    run gcloud compute tpus queued-resources describe "$(flag name)" "${place[@]}" '--format=value(state.state)'
}

ask_hosts() {
    on_hosts all "$(quote bash step_grpo/tpu/on_host.sh state "${program[@]}") || echo step_grpo_state=absent"
}

look_for_result() {
    local argument workdir=""
    for argument in "${program[@]}"; do
        if [[ $argument == --workdir=* ]]; then workdir=${argument#--workdir=}; fi
    done
    run gcloud storage ls "${workdir%/}/result.json"
}

# done, stopped, or unknown: what a run that exited with 0 was.
ending() {
    local answer
    if answer=$(look_for_result 2>&1); then
        printf "done"
    elif [[ $answer == *"matched no objects"* ]]; then
        printf stopped
    else
        printf unknown
    fi
}

# ACTIVE and so on; GONE where there is none; UNKNOWN where gcloud does not tell.
slice_state() {
    local answer
    if answer=$(describe 2>&1); then
        printf '%s' "${answer##*$'\n'}"
    elif [[ $answer == *NOT_FOUND* ]]; then
        printf GONE
    else
        printf UNKNOWN
    fi
}

# What the hosts say, together: done, stopped, running, absent, mistake, crashed, or unknown.
run_state() {
    local hosts
    hosts=$(ask_hosts 2>/dev/null | sed -n 's/^step_grpo_state=//p' | sort -u | tr '\n' ' ') || hosts=""
    case $hosts in
        "") printf unknown ;;
        *exit:2\ *) printf mistake ;;
        *exit:[1-9]* | *lost*) printf crashed ;;
        "exit:0 ") ending ;;
        "absent ") printf absent ;;
        *absent*) printf crashed ;;
        *) printf running ;;
    esac
}

tries=0 # since the run was last seen running
back_off() {
    local delay
    delay=$(($(flag backoff 30) * 2 ** (tries < 10 ? tries : 10)))
    tries=$((tries + 1))
    sleep $((delay < MAX_DELAY ? delay : MAX_DELAY))
}

preemptions=0
count_preemption() {
    preemptions=$((preemptions + 1))
    ((preemptions <= $(flag max-preemptions 100))) || give_up "the $1 $preemptions times"
    back_off
}

create_again() {
    count_preemption "slice was lost"
    say "creating the slice again ($preemptions)"
    create || say "it could not be created"
}

launched=""
launch_first() {
    launched=1
    set_up_and_launch || say "it could not be launched"
}

crashes=0
launch_again() {
    crashes=$((crashes + 1))
    ((crashes <= $(flag max-crashes 10))) || give_up "the program broke off $crashes times (tpu/logs.sh)"
    back_off
    say "launching again ($crashes)"
    set_up_and_launch || say "it could not be launched"
}

# Asked to stop on a slice that is there: the host may yet be taken away, and then the slice is created again.
launch_stopped() {
    count_preemption "run was stopped"
    say "going on with the run ($preemptions)"
    set_up_and_launch || say "it could not be launched"
}

silence=0 # looks in a row without an answer
count_silence() {
    silence=$((silence + 1))
    ((silence < MAX_SILENCE)) || give_up "$1 did not answer $silence times in a row"
}

finish() {
    say "the line has come to its end"
    if [[ -n $(flag delete-when-done) ]]; then script delete.sh "$slice_flags"; fi
    exit 0
}

look_at_run() {
    local state
    state=$(run_state)
    say "the run is $state"
    if [[ $state == unknown ]]; then
        count_silence "the hosts"
        return
    fi
    silence=0
    case $state in
        done) finish ;;
        running) tries=0 ;;
        mistake)
            [[ -z $launched ]] || give_up "the program says that its settings are wrong (tpu/logs.sh)"
            launch_first # of an earlier day: what was wrong may be mended
            ;;
        absent) if [[ -n $launched ]]; then launch_again; else launch_first; fi ;;
        stopped) launch_stopped ;;
        crashed) launch_again ;;
    esac
}

show_plan() {
    echo "# at first, and after a preemption:" && create
    echo "# once the state is ACTIVE, and after a crash:" && set_up_and_launch
    echo "# every $(flag poll 60) seconds:" && describe && ask_hosts
    echo "# where all hosts have exited with 0:" && look_for_result
    echo "# where the state is SUSPENDED or FAILED$([[ -z $(flag delete-when-done) ]] || echo ', and in the end'):"
    script delete.sh "$slice_flags"
}

if [[ -n $dry_run ]]; then
    show_plan
    exit 0
fi
(dry_run=1 && create >/dev/null) || exit # its flags are wrong
created=""
while true; do
    state=$(slice_state)
    say "the slice is $state"
    case $state in
        ACTIVE) created=1 && look_at_run ;;
        GONE)
            launched=""
            if [[ -n $created ]]; then
                create_again
            else
                created=1
                create || say "it could not be created"
            fi
            ;;
        SUSPENDED | FAILED)
            created=1
            script delete.sh "$slice_flags" || count_silence gcloud
            ;;
        UNKNOWN) count_silence gcloud ;;
        *) silence=0 ;;
    esac
    sleep "$(flag poll 60)"
done
