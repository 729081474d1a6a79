#!/usr/bin/env bash
# A JobSet on GKE, a pod on each TPU host; Kubernetes starts all of them again when one was preempted or died.
#   NAME=wemmu IMAGE=... ACCELERATOR=tpu-v5p-slice TOPOLOGY=4x4x8 CLAIM=... \
#     launch/gke.sh [--dry-run] CONFIG.py CONVERTED RUNS [--config.key=value ...]
# IMAGE has this repository as its working directory, installed. CLAIM: the volume claim that is mounted at /data, where
# CONVERTED, RUNS and the data are. SLICES: node pools (1). SPOT=1: on spot nodes. CHIPS: of a host (4).
# WEMMU_JOIN_TIMEOUT: seconds that all hosts may take to come, nodes made and IMAGE pulled (1800).
set -euo pipefail

dry=
if [ "${1-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 3 ] || [ -z "${NAME-}" ] || [ -z "${IMAGE-}" ] || [ -z "${ACCELERATOR-}" ] || [ -z "${TOPOLOGY-}" ] ||
  [ -z "${CLAIM-}" ]; then
  sed -n '2,7p' "$0" >&2
  exit 2
fi
chips=${CHIPS:-4}
if ! [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || [ $((${TOPOLOGY//x/*} % chips)) -ne 0 ]; then
  echo "gke.sh: TOPOLOGY=$TOPOLOGY; expected chips along each axis, like 4x4x8, in all a multiple of the $chips of a host" >&2
  exit 2
fi
hosts=$((${TOPOLOGY//x/*} / chips))
words=
for word in launch/stages.sh "$@"; do words+="${words:+, }'${word//\'/\'\'}'"; done

spot=
[ -z "${SPOT-}" ] || spot='                cloud.google.com/gke-spot: "true"'

jobset() {
  cat <<EOF
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 50
    rules:
      - action: FailJobSet # an error that somebody has to mend
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: ${SLICES:-1}
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0 # a pod that fails takes the others with it
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes:
                  containerName: wemmu
                  operator: In
                  values: [2]
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 600 # a step, and a checkpoint
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
$spot
              containers:
                - name: wemmu
                  image: $IMAGE
                  command: [$words]
                  env:
                    - name: JAX_PLATFORMS
                      value: tpu
                    - name: WEMMU_JOIN_TIMEOUT
                      value: "${WEMMU_JOIN_TIMEOUT:-1800}"
                  ports:
                    - containerPort: 8471 # between TPU hosts
                    - containerPort: 8482 # JAX's coordinator
                  resources:
                    limits:
                      google.com/tpu: $chips
                  volumeMounts:
                    - name: data
                      mountPath: /data
              volumes:
                - name: data
                  persistentVolumeClaim:
                    claimName: $CLAIM
EOF
}

if [ -n "$dry" ]; then
  echo "# kubectl apply -f -"
  jobset
else
  jobset | kubectl apply -f -
fi
