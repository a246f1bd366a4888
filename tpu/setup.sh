#!/usr/bin/env bash
# Sends the commit that is checked out to every host of a slice and installs it there.
#
#   tpu/setup.sh --name=NAME --zone=ZONE [--commit=SHA] [--project=P] [--dry-run]
#
# Run it again after a new commit. Changes that are not committed are not sent.

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "name zone project commit" "$@"
check_slice
check commit 'HEAD|[0-9a-f]{7,64}' 'a commit of this checkout'

archive=$root/dist/step_grpo.tar.gz
if [[ -z $dry_run && -n $(git -C "$root" status --porcelain --untracked-files=no) ]]; then
    printf '%s: warning: changes that are not committed are not sent\n' "${0##*/}" >&2
fi
run mkdir -p "$root/dist"
run git -C "$root" archive --format=tar.gz --prefix=step_grpo/ "--output=$archive" "$(flag commit HEAD)"
run gcloud compute tpus tpu-vm scp "$archive" "$(flag name):" "${place[@]}" --worker=all
on_hosts all 'tar -xzf step_grpo.tar.gz && bash step_grpo/tpu/on_host.sh setup'
