#!/usr/bin/env bash
# Deletes a slice: its queued resource and its hosts, with all that is on their disks.
#
#   tpu/delete.sh --name=NAME --zone=ZONE [--project=P] [--dry-run]

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "name zone project" "$@"
check_slice

run gcloud compute tpus queued-resources delete "$(flag name)" "${place[@]}" --force --quiet
