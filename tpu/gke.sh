#!/usr/bin/env bash
# Submits a run to a GKE cluster through the Cluster Toolkit's gcluster.
#
#   tpu/gke.sh --name=NAME --cluster=CLUSTER --location=REGION --compute-type=TYPE --image=IMAGE \
#       --config=FILE --workdir=gs://BUCKET/FOLDER [--config.FIELD=VALUE ...]
#
#   --compute-type=TYPE    v6e-N, v5litepod-N or v5p-N, N chips
#   --topology=T           of the slice, such as 2x4; default: the one for the compute type
#   --num-slices=N         default: 1
#   --image=IMAGE          made from tpu/Dockerfile, in a registry that the cluster can read
#   --restarts=N           how often the job goes on after a preemption or a crash; default: 100
#   --service-account=A    of the cluster; it must be allowed to write to the bucket of the workdir
#   --spot                 spot nodes, where the cluster has node auto-provisioning
#   --project=P            default: gcluster's
#   --dry-run              print the commands, run nothing
#
# A mistake in the settings (the program's exit code 2) ends the job; after any other end but that of the line it
# goes on, also after one that it was asked for (a signal, a notice of maintenance).

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse_flags "name cluster location project compute-type topology num-slices image restarts service-account spot? program" "$@"
need name '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'the name of the job: small letters, digits and dashes'
need cluster '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' 'the name of a GKE cluster'
need location '[a-z]+-[a-z]+[0-9]+(-[a-z])?' 'a region or zone such as us-east5'
check project '[a-z0-9][-a-z0-9:.]*' 'a project id'
need compute-type '[a-z0-9][-a-z0-9]*' 'a type such as v6e-8'
check topology '[1-9][0-9]*(x[1-9][0-9]*){1,2}' 'a topology such as 2x4 or 2x2x4'
need image '[^ ]+/[^ ]+' 'an image with its registry'
check num-slices '[1-9][0-9]*' 'a number of slices'
check restarts '0|[1-9][0-9]*' 'a number of restarts'
check service-account '[a-z0-9]([-a-z0-9.]*[a-z0-9])?' 'the name of a Kubernetes service account'
check_program

options=("--name=$(flag name)" "--cluster=$(flag cluster)" "--location=$(flag location)")
options+=("--compute-type=$(flag compute-type)" "--image=$(flag image)" "--restarts=$(flag restarts 100)")
for key in project topology num-slices service-account; do
    if [[ -n $(flag "$key") ]]; then options+=("--$key=$(flag "$key")"); fi
done
if [[ -n $(flag spot) ]]; then options+=(--gke-nap-provisioning=spot); fi

# A bug, what may be well later, and the signals of an end from outside; any other exit code is final.
options+=("--restart-on-exit-codes=1,75,134,137,139,143")
options+=(--grace-period=120s) # for saving what is done

# The container runs the line with a shell; in the shell's place, the program hears the signal to stop.
run gcluster job submit "${options[@]}" "--command=exec $(quote python -u -m step_grpo.main "${program[@]}" --requeue)"
