# shellcheck shell=bash
# Shared by the scripts of this folder: arguments, mistakes, and commands that are run or only shown.
# The caller has set `set -euo pipefail`. Nothing here runs on a TPU; on_host.sh does.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
dry_run=""
program=() # --config..., --workdir=...: the arguments of the training program
place=()   # --zone=..., --project=...: what every gcloud command takes

# A mistake of the user: one line, exit 2.
die() {
    printf '%s: error: %s\n' "${0##*/}" "$1" >&2
    exit 2
}

# The comment at the head of the script.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# parse_flags "name zone spot? program" "$@"
#
# `name` allows --name=VALUE and sets flag_name; `spot?` allows --spot and sets flag_spot to 1; `program` takes
# --config... and --workdir=... into the array `program`. --help and --dry-run are always there.
parse_flags() {
    local allowed=" $1 " argument key
    shift
    for argument in "$@"; do
        key=${argument%%=*}
        key=${key#--}
        case $argument in
            --help | -h) usage && exit 0 ;;
            --dry-run) dry_run=1 ;;
            --config=* | --config.*=* | --workdir=*)
                [[ $allowed == *" program "* ]] || die "unknown argument: $argument (see --help)"
                program+=("$argument")
                ;;
            --*=*)
                [[ $key =~ ^[a-z-]+$ && $allowed == *" $key "* ]] || die "unknown argument: $argument (see --help)"
                [[ -n ${argument#*=} ]] || die "--$key is empty (see --help)"
                printf -v "flag_${key//-/_}" '%s' "${argument#*=}"
                ;;
            --*)
                [[ $key =~ ^[a-z-]+$ && $allowed == *" $key? "* ]] ||
                    die "unknown argument, or one without =VALUE: $argument (see --help)"
                printf -v "flag_${key//-/_}" 1
                ;;
            *) die "unexpected argument: $argument (see --help)" ;;
        esac
    done
}

# flag NAME [DEFAULT]: its value.
flag() {
    local variable="flag_${1//-/_}"
    printf '%s' "${!variable:-${2-}}"
}

# check NAME PATTERN WHAT: the flag must match the whole pattern where it is given.
check() {
    local value
    value=$(flag "$1")
    [[ -z $value || $value =~ ^($2)$ ]] || die "--$1=$value: must be $3"
}

# need NAME PATTERN WHAT: it must also be given.
need() {
    [[ -n $(flag "$1") ]] || die "--$1 is missing: give $3"
    check "$@"
}

# What names a slice.
check_slice() {
    need name '[a-z]([-a-z0-9]{0,59}[a-z0-9])?' 'the name of the slice: small letters, digits and dashes'
    need zone '[a-z]+-[a-z]+[0-9]+-[a-z]' 'a zone such as us-east5-b'
    check project '[a-z0-9][-a-z0-9:.]*' 'a project id'
    place=("--zone=$(flag zone)")
    if [[ -n $(flag project) ]]; then place+=("--project=$(flag project)"); fi
}

# What the training program is called with, checked before anything is paid for.
check_program() {
    local argument config="" workdir=""
    for argument in ${program[@]+"${program[@]}"}; do
        case $argument in
            --config=*) config=${argument#--config=} ;;
            --workdir=*) workdir=${argument#--workdir=} ;;
        esac
    done
    [[ -n $config ]] || die "--config is missing: give a config of this checkout, such as configs/qwen3_8b.py"
    [[ $config != /* && -f $root/${config%%:*} ]] ||
        die "--config=$config: no such file in $root; name it from there, such as configs/qwen3_8b.py"
    [[ $workdir =~ ^gs://[^/]+/. ]] ||
        die "--workdir=$workdir: must be gs://BUCKET/FOLDER, for the disks of the hosts are lost with them"
}

# quote WORD...: a line that a POSIX shell reads back as these very words.
quote() {
    local word escaped="'\\''" line=""
    for word in "$@"; do
        if [[ ! $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
            word="'${word//\'/$escaped}'"
        fi
        line+="$word "
    done
    printf '%s' "${line% }"
}

# run COMMAND...: runs it; with --dry-run only shows it.
run() {
    if [[ -n $dry_run ]]; then
        printf '%s\n' "$(quote "$@")"
    else
        "$@"
    fi
}

# on_hosts WORKER COMMAND: runs a line in the shell of one worker, or of `all`.
on_hosts() {
    run gcloud compute tpus tpu-vm ssh "$(flag name)" "${place[@]}" "--worker=$1" "--command=$2"
}
