#!/usr/bin/env bash
# Asks for a TPU slice as a queued resource.
#
#   tpu/create.sh --name=NAME --zone=ZONE --accelerator=TYPE [--spot] [--dry-run]
#
#   --accelerator=TYPE     v6e-N or v5litepod-N (N chips), v5p-N or v4-N (N cores, two a chip)
#   --spot                 cheaper, and may be taken away at any time: see watch.sh; without it, on demand
#   --runtime-version=V    of the hosts' system image; default: the one for the accelerator
#   --valid-until=TIME     give up when the slice has not come by then, such as 6h
#   --service-account=A    of the hosts; it must be allowed to write to the bucket of the workdir
#   --project=P            default: gcloud's
#   --dry-run              print the commands, run nothing

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "name zone project accelerator runtime-version valid-until service-account spot?" "$@"
check_slice
need accelerator '(v4|v5litepod|v5p|v6e)-[1-9][0-9]*' 'v6e-N, v5p-N, v5litepod-N or v4-N'
check runtime-version '[a-z0-9][-a-z0-9.]*' 'a version such as v2-alpha-tpuv6e'
check valid-until '[1-9][0-9]*[hd]' 'a duration such as 6h'
check service-account '[^@ ]+@[^@ ]+' 'the e-mail address of a service account'

case $(flag accelerator) in
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    *) runtime=tpu-ubuntu2204-base ;;
esac
options=("--node-id=$(flag name)" "--accelerator-type=$(flag accelerator)")
options+=("--runtime-version=$(flag runtime-version "$runtime")")
if [[ -n $(flag spot) ]]; then options+=(--spot); fi
if [[ -n $(flag valid-until) ]]; then options+=("--valid-until-duration=$(flag valid-until)"); fi
if [[ -n $(flag service-account) ]]; then options+=("--service-account=$(flag service-account)"); fi

run gcloud compute tpus queued-resources create "$(flag name)" "${place[@]}" "${options[@]}"
