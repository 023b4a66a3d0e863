#!/usr/bin/env bash
# A TPU slice on GKE as a JobSet: one pod per host, all restarted together when one fails or is preempted.
#
#   launch/gke.sh [--dry-run] [ARGS]      ARGS go to xcomp_jax.train; --dry-run prints the JobSet instead of applying it
#
# Settings, all needed but those with a default:
#   NAME  IMAGE (built from this repository with `pip install '.[tpu,gcs]'`, the repository as working directory)
#   ACCELERATOR (tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice)  TOPOLOGY (4x4)  HOSTS (4)  CHIPS (4, of each host)
#   WORKDIR (gs://bucket/runs/sct)  RESTARTS (100)
#   DATA (gs://bucket, or the name of a PersistentVolumeClaim that many pods may read: at /mnt/data, read-only)
#   ACCOUNT (default: the Kubernetes service account of the pods)
#   CONFIG (configs/sct.py; FILE or FILE:VARIANT, as configs/sct.py:7b; or --config=... in ARGS): configs/... is that of IMAGE; any
#     other file goes from here to the pods in a ConfigMap, NAME-config
#   PYTHON (python; 3.11 or newer): that of IMAGE
# The cluster needs JobSet (https://jobset.sigs.k8s.io), and for DATA=gs://bucket the add-on GcsFuseCsiDriver. By Workload
# Identity ACCOUNT may read DATA's bucket (roles/storage.objectViewer) and write WORKDIR's (roles/storage.objectUser).
# The same image runs under XPK, which makes cluster and JobSet, and mounts what `xpk storage attach` was told:
#   xpk workload create --cluster CLUSTER --workload NAME --tpu-type v5litepod-16 --docker-image IMAGE --max-restarts 100 \
#     --command "sh launch/pod.sh python -u -m xcomp_jax.train --config=configs/sct.py --config.workdir=gs://bucket/runs/sct"
set -euo pipefail

PYTHON=${PYTHON:-python}
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"
apply=(kubectl apply -f -)
[[ $dry == 0 ]] || apply=(cat)

need NAME IMAGE ACCELERATOR TOPOLOGY HOSTS CHIPS WORKDIR DATA
read_options --config.workdir="$WORKDIR" "$@"

case "$DATA" in
  gs://*/?* | gs:// | gs:///*)
    fail "DATA=$DATA: expected gs://BUCKET; it is at /mnt/data whole, and --config.data.train=/mnt/data/FOLDER"
    ;;
  gs://*)
    bucket=${DATA#gs://}
    # implicit-dirs: folders are there that no object stands for, as after `gcloud storage cp`.
    attributes="{bucketName: ${bucket%/}, mountOptions: implicit-dirs}"
    volume="csi: {driver: gcsfuse.csi.storage.gke.io, readOnly: true, volumeAttributes: $attributes}"
    sidecar=true # runs gcsfuse in the pod
    ;;
  *)
    volume="persistentVolumeClaim: {claimName: $DATA, readOnly: true}"
    sidecar=false
    ;;
esac

own='' own_mount='' own_volume=''
if [[ "$file" != configs/* ]]; then
  options[0]=--config=/etc/xcomp/config.py$variant
  # Indented by what `|2` says, whatever its first line is.
  own="apiVersion: v1
kind: ConfigMap
metadata:
  name: $NAME-config
data:
  config.py: |2
$(sed 's/^/    /' "$file")
---"
  own_mount='- {name: config, mountPath: /etc/xcomp, readOnly: true}'
  own_volume="- {name: config, configMap: {name: $NAME-config}}"
fi

command=
for argument in sh launch/pod.sh "$PYTHON" -u -m xcomp_jax.train "${options[@]}"; do
  escaped=${argument//\\/\\\\}
  escaped=${escaped//\"/\\\"}
  escaped=${escaped//$'\n'/\\n}
  command+="${command:+, }\"${escaped//\$/\$\$}\"" # to Kubernetes $(NAME) is a variable, and $$ a $
done

# JobSet gives the pods names that find each other; GKE tells them who they are (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES), from
# which JAX takes coordinator and process. 120 s of grace: SIGTERM saves the step at hand, and launch/pod.sh ends with 75,
# not 0, so that the policy below starts all pods again.
"${apply[@]}" << YAML
$own
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
spec:
  failurePolicy:
    maxRestarts: ${RESTARTS:-100}
  replicatedJobs:
    - name: train
      replicas: 1
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "$sidecar"
            spec:
              serviceAccountName: ${ACCOUNT:-default}
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
              containers:
                - name: train
                  image: $IMAGE
                  command: [$command]
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                  resources:
                    limits:
                      google.com/tpu: $CHIPS
                  volumeMounts:
                    - {name: data, mountPath: /mnt/data, readOnly: true}
                    $own_mount
              volumes:
                - name: data
                  $volume
                $own_volume
YAML
