#!/usr/bin/env bash
# Shows what the run on a host has printed.
#
#   tpu/logs.sh --name=NAME --zone=ZONE [--worker=0] [--lines=100] [--follow] [--project=P] [--dry-run]
#
# Worker 0 reports the run; another one is worth a look when worker 0 waits for it.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "name zone project worker lines follow?" "$@"
check_slice
check worker '[0-9]+|all' 'the number of a worker, or all'
check lines '[1-9][0-9]*' 'a number of lines'

action=logs
if [[ -n $(flag follow) ]]; then action=follow; fi
on_hosts "$(flag worker 0)" "bash step_grpo/tpu/on_host.sh $action $(flag lines 100)"
