#!/usr/bin/env bash
# Starts the same training line on every host of a slice, where it outlives the ssh session.
#
#   tpu/launch.sh --name=NAME --zone=ZONE --config=FILE --workdir=gs://BUCKET/FOLDER [--config.FIELD=VALUE ...]
#
#   --restart              end a run that is still there first
#   --project=P            default: gcloud's
#   --dry-run              print the commands, run nothing
#
# The same line again goes on from the newest checkpoint in the workdir. logs.sh shows what the run prints.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "name zone project program restart?" "$@"
check_slice
check_program

action=start
if [[ -n $(flag restart) ]]; then action=restart; fi
# Quoted for the shell of the host, whatever the overrides hold.
on_hosts all "$(quote bash step_grpo/tpu/on_host.sh "$action" "${program[@]}")"
