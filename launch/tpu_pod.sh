#!/usr/bin/env bash
# Runs a command on every worker of a Cloud TPU slice, or of several that train one run (multislice): it queues for them,
# sets them up, and replaces them when they are preempted.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: bash launch/tpu_pod.sh ACTION --name=NAME --project=PROJECT --zone=ZONE [OPTIONS] [-- PYTHON ARGUMENTS]

Actions
  create    queue for a slice and wait until it is there
  run       create it where it is not, copy this directory to all workers, run `python PYTHON ARGUMENTS` on all of them
            and wait; a slice that is preempted is replaced and the command run again, which a study or a training run
            continues. Stopped on this side (Ctrl-C), it goes on there; the same command waits for it again
  status    state of the slice, and of the command on each worker
  logs      the last lines of the command on each worker, and the newest line of its metrics
  fetch     copy the workdir (--workdir=DIR) from --results, or from worker 0, to the same path here
  delete    give the slice back

Options (or environment variables TPU_NAME, TPU_PROJECT, TPU_ZONE, TPU_TYPE, TPU_RUNTIME, TPU_RESULTS)
  --type=v5litepod-8            accelerator type
  --slices=1                    slices of that type for one run together (multislice): NAME-0, NAME-1, ..., queued for
                                as one. The command needs --distributed, and the batch is split over them (config.mesh)
  --runtime=v2-alpha-tpuv5-lite software of the TPU VMs; without, that of the type: v4, v5litepod, v5p or v6e
  --results=gs://BUCKET/PATH    for a command whose workdir is a directory: keep a copy there, every minute; a new slice
                                starts from it. --workdir=gs://BUCKET/PATH of the command needs none; without either, a
                                preempted slice starts anew
  --workdir=DIR                 for fetch: the workdir given to the command
  --on_demand                   no spot slice
  --retries=3                   times that a command that fails is run again; preemption does not count
  --poll=30                     seconds between looks
  --delete_when_done            give the slice back when the command ends
  --dry_run                     print the commands instead of running them; it and --help count wherever they stand,
                                after -- too
  --help                        this text

Example: bash launch/tpu_pod.sh run --name=big --project=PROJECT --zone=us-east5-a --type=v5litepod-8 \
             -- -m precision_scaling.study --config=configs/paper.py --workdir=gs://BUCKET/big \
             --config.mesh=auto --config.train.microbatches=auto
TEXT
}

say() { echo "$(date +%H:%M:%S) $name: $*" >&2; }

check_options() {
  local LC_ALL=C option argument
  for option in name project zone type runtime; do
    [ -n "${!option}" ] || die "--$option is missing (or set TPU_$(tr '[:lower:]' '[:upper:]' <<<"$option"))"
    [[ "${!option}" =~ ^[A-Za-z0-9][A-Za-z0-9._:-]*$ ]] || die "--$option=${!option}: allowed are letters, digits and -"
  done
  [[ "$name" =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] || die "--name=$name: allowed are up to 63 small letters, digits and -"
  whole_number --slices "$slices" 1 256
  whole_number --retries "$retries" 0 1000000
  whole_number --poll "$poll" 0 86400
  one_line "$results"
  # gcloud expands patterns, in the names of buckets and of files.
  [[ -z "$results" || "$results" =~ ^gs://[a-z0-9][a-z0-9._-]*(/[^][*?#]*)?$ ]] ||
    die "--results=$results: allowed is gs://BUCKET/PATH, without * ? # [ ]"
  case "$action" in
    run)
      [ ${#arguments[@]} -gt 0 ] || die "run: the command is missing, e.g. -- -m precision_scaling.study --config=FILE --workdir=DIR"
      [ -z "$workdir" ] || die "--workdir=$workdir: the workdir of run is the command's, after --"
      for argument in "${arguments[@]}"; do
        [[ "$argument" != --workdir=* ]] || workdir="${argument#*=}"
      done
      [[ -z "$results" || "$workdir" != gs://* ]] || die "--results=$results: --workdir=$workdir is in a bucket already"
      [[ "$slices" = 1 || " ${arguments[*]} " = *" --distributed "* ]] ||
        die "--slices=$slices: the command needs --distributed, by which the slices find each other"
      [[ "$slices" = 1 || -z "$results" ]] || die "--slices=$slices: with --workdir=gs://BUCKET/PATH, not --results"
      [[ -z "$results" || -n "$workdir" ]] || die "--results=$results: the command has no --workdir=DIR to keep there"
      ;;
    fetch)
      [ -n "$workdir" ] || die "--workdir is missing: the directory that the command was given"
      # The other side's shell or scp reads the name once more.
      [[ -n "$results" || "$workdir" =~ ^[A-Za-z0-9_./=,@%+-]+$ ]] ||
        die "--workdir=$workdir: only letters, digits and _./=,@%+- can be fetched from a worker; --results keeps any"
      ;;
  esac
  if [[ -n "$workdir" && (-n "$results" || "$action" = fetch) ]]; then directory --workdir "$workdir"; fi
  [[ -z "$results" || "$workdir" != *[][*?]* ]] || die "--workdir=$workdir: with --results it has no * ? [ ]"
}

call() {
  if $dry_run; then
    quoted "$@"
  else
    "$@"
  fi
}

# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
name="${TPU_NAME:-}" project="${TPU_PROJECT:-}" zone="${TPU_ZONE:-}" type="${TPU_TYPE:-v5litepod-8}"
runtime="${TPU_RUNTIME:-}" results="${TPU_RESULTS:-}" workdir=""
slices=1 spot=true retries=3 poll=30 delete_when_done=false
read_arguments "$@"
for option in ${options[@]+"${options[@]}"}; do
  case "$option" in
    --name=* | --project=* | --zone=* | --type=* | --runtime=* | --results=* | --workdir=* | --slices=* | --retries=* | --poll=*)
      key="${option%%=*}"
      printf -v "${key#--}" %s "${option#*=}"
      ;;
    --on_demand) spot=false ;;
    --delete_when_done) delete_when_done=true ;;
    *) die "$option: no such option; those of the command come after -- (--help)" ;;
  esac
done
if [ -z "$runtime" ]; then
  case "$type" in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) ;; # said to be missing
  esac
fi
check_options
$dry_run || need_gcloud
cd "$(dirname "${BASH_SOURCE[0]}")/.."

where=(--project="$project" --zone="$zone" --quiet)
queue() { call gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
nodes=("$name")
if [ "$slices" -gt 1 ]; then nodes=($(seq -f "$name-%g" 0 $((slices - 1)))); fi

# each_node COMMAND ...: calls it with every slice, at the same time; fails where one does.
each_node() {
  local node pid status=0 pids=()
  if $dry_run || [ ${#nodes[@]} = 1 ]; then
    for node in "${nodes[@]}"; do "$@" "$node" || status=$?; done
    return "$status"
  fi
  for node in "${nodes[@]}"; do
    "$@" "$node" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
  return "$status"
}
on_node() { call gcloud compute tpus tpu-vm ssh "$2" "${where[@]}" --worker=all --command="$1"; }
remote() { each_node on_node "$1"; }
copy_to() { call gcloud compute tpus tpu-vm scp "$1" "$2:precision_scaling.tgz" "${where[@]}" --worker=all; }

state() { # ABSENT, UNKNOWN (gcloud could not say), or what the API calls it
  local answer errors
  errors="$(mktemp)"
  if answer="$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>"$errors")"; then
    echo "${answer:-UNKNOWN}"
  elif grep -q NOT_FOUND "$errors"; then
    echo ABSENT
  else
    grep -m 1 . "$errors" >&2 || true
    echo UNKNOWN
  fi
  rm -f "$errors"
}

request() {
  local flags=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  if [ "$slices" -gt 1 ]; then flags=(--node-count="$slices" --node-prefix="$name" "${flags[@]:1}"); fi
  if $spot; then flags+=(--spot); fi
  queue create "${flags[@]}"
}

give_back() { queue delete --force; }

# Until the slice is there: asks for one, replaces one that was taken away, and is patient with a queue or a bad network.
ensure_active() {
  if $dry_run; then
    request
    queue describe --format='value(state.state)'
    return
  fi
  local now before="" unknown=0 refused=0
  while true; do
    now="$(state)"
    [ "$now" = "$before" ] || say "$now"
    before="$now"
    [ "$now" = UNKNOWN ] || unknown=0
    case "$now" in
      ACTIVE) return ;;
      ABSENT) request || [ $((refused += 1)) -lt 3 ] || die "$name: could not be queued; gcloud's message is above" ;;
      SUSPENDED | SUSPENDING) give_back || say "could not be given back yet" ;;
      FAILED)
        [ $((refused += 1)) -lt 3 ] || die "$name: queued 3 times and failed; see --type, --runtime, --zone and your quota"
        give_back || say "could not be given back yet"
        ;;
      UNKNOWN) [ $((unknown += 1)) -lt 20 ] || die "$name: gcloud has not answered 20 times" ;;
      *) ;; # ACCEPTED, PROVISIONING, WAITING_FOR_RESOURCES, CREATING, DELETING
    esac
    sleep "$poll"
  done
}

worker="bash precision_scaling/launch/tpu_worker.sh"

# Copies this directory (what git does not ignore) to all workers and starts the command, where it does not run already.
start() {
  local archive command
  command="$worker is_running 2>/dev/null || { mkdir -p precision_scaling && tar -xzf precision_scaling.tgz -C precision_scaling; }"
  command="$command && $worker start $(quoted "$results" "$workdir" "${arguments[@]}")"
  if $dry_run; then
    echo 'git ls-files -z --cached --others --exclude-standard | tar -czf precision_scaling.tgz --null -T -'
    each_node copy_to precision_scaling.tgz
    remote "$command"
    return
  fi
  archive="$(mktemp -d)"
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar -czf "$archive/precision_scaling.tgz" --null -T - || die "$PWD: could not be packed; it must be a git checkout"
  each_node copy_to "$archive/precision_scaling.tgz" && remote "$command"
  local status=$?
  rm -rf "$archive"
  return "$status"
}

# Waits for the command: done, failed (on some worker) or preempted (the slice is not there any more).
watch() {
  local answer now silent=0
  while true; do
    if answer="$(remote "$worker status" 2>/dev/null)" && grep -q '^worker ' <<<"$answer"; then
      silent=0
      if ! grep '^worker ' <<<"$answer" | grep -qv ': done$'; then
        echo "done"
        return
      elif grep -q '^worker .*: \(failed\|stopped\)' <<<"$answer"; then
        sleep "$poll" # a slice that is being taken away says so a little later
        if [ "$(state)" = ACTIVE ]; then echo failed; else echo preempted; fi
        return
      fi
    else
      now="$(state)"
      case "$now" in
        ACTIVE | UNKNOWN) [ $((silent += 1)) -lt 20 ] || die "$name: the workers have not answered 20 times" ;;
        *)
          echo preempted
          return
          ;;
      esac
    fi
    sleep "$poll"
  done
}

run() {
  local outcome failures=0
  if $spot && [[ -z "$results" && "$workdir" != gs://* ]] && ! $dry_run; then
    say "without --workdir=gs://BUCKET/PATH, or --results=, a preempted spot slice starts anew"
  fi
  while true; do
    ensure_active
    if $dry_run; then
      start
      remote "$worker status"
      outcome="done"
    elif start; then
      outcome="$(watch)"
    elif [ "$(state)" = ACTIVE ]; then
      outcome=failed
    else
      outcome=preempted
    fi
    case "$outcome" in
      done)
        $dry_run || remote "$worker logs 5" >&2 || true
        break
        ;;
      preempted) say "preempted: queueing for another slice" ;;
      *)
        remote "$worker logs 5" >&2 || true
        [ $((failures += 1)) -le "$retries" ] || die "$name: the command failed $failures times; its last lines are above"
        say "the command failed: run $((failures + 1)) of $((retries + 1))"
        remote "$worker stop" || true
        ;;
    esac
  done
  if $delete_when_done; then give_back; fi
  $dry_run || say "done"
}

case "$action" in
  create) ensure_active ;;
  run) run ;;
  status)
    if $dry_run; then queue describe --format='value(state.state)'; else
      now="$(state)"
      echo "$name: $now"
      [ "$now" = ACTIVE ] || exit 0
    fi
    remote "$worker status"
    ;;
  logs) remote "$worker logs 50" ;;
  fetch)
    if [ -n "$results" ]; then
      call mkdir -p "$workdir"
      call gcloud storage rsync --recursive "$results" "$workdir"
    else
      [[ "$workdir" == /* ]] && there="$workdir" || there="precision_scaling/$workdir"
      call mkdir -p "$(dirname "$workdir")"
      call gcloud compute tpus tpu-vm scp --recurse "${nodes[0]}:$there" "$(dirname "$workdir")" "${where[@]}" --worker=0
    fi
    ;;
  delete) give_back ;;
esac
