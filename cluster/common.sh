# Shared by lsf/job.sh, slurm/wlsup.sbatch and cluster/torchrun.sh; to be sourced. A run is described by the variables
# that `make train` has (APPROACH, PRESET, SEED, DATA, ARGS, RUNS), and by SHARDS, RUN_DIR, PRECISION and STRATEGY.
# shellcheck shell=bash

say() { printf 'wlsup: %s\n' "$*" >&2; }
fail() {
    printf 'wlsup: error: %s\n' "$*" >&2
    exit 2
}

# Fill the array OPTIONS with the run's options. RUN_DIR, NODES and PROCESSES are set by then, and LIMIT, the seconds
# after which training stops with a checkpoint, where there is one. What ARGS says comes last, and wins.
wlsup_options() {
    local approach=${APPROACH:-film} preset=${PRESET:-mini} overlay values arguments argument
    [ -f "experiments/$approach.yaml" ] ||
        fail "APPROACH=$approach has no recipe experiments/$approach.yaml; the recipes are: $(recipes)."
    OPTIONS=(-c experiments/base.yaml -c "experiments/$approach.yaml")
    if [ "$preset" != mini ]; then
        overlay=experiments/overlays/${preset}_$approach.yaml
        [ -f "$overlay" ] || overlay=experiments/overlays/$preset.yaml
        [ -f "$overlay" ] || fail "PRESET=$preset has no recipe $overlay; use mini, or add it."
        OPTIONS+=(-c "$overlay")
        values=experiments/overlays/$preset/$approach.yaml
        [ ! -f "$values" ] || OPTIONS+=(-c "$values")
    fi
    case ${DATA:-} in
    '') ;;
    *.yaml | *.yml) OPTIONS+=(-c "$DATA") ;;
    *) OPTIONS+=(--data.source table --data.captions "$DATA" --data.pairs null) ;;
    esac
    [ -z "${SHARDS:-}" ] || OPTIONS+=(--data.source shards --data.images "$SHARDS")
    OPTIONS+=(--seed_everything "${SEED:-0}" --run_dir "$RUN_DIR" --resume auto)
    OPTIONS+=(--trainer.num_nodes "$NODES" --trainer.devices "$PROCESSES")
    [ -z "${STRATEGY:-}" ] || OPTIONS+=(--trainer.strategy "$STRATEGY")
    [ -z "${PRECISION:-}" ] || OPTIONS+=(--trainer.precision "$PRECISION")
    [ -z "${LIMIT:-}" ] || OPTIONS+=(--checkpoints.time_limit "${LIMIT}s")
    if [ -n "${ARGS:-}" ]; then # as make's shell does: split at blanks, with quotes holding together
        arguments=$(printf '%s\n' "$ARGS" | xargs printf '%s\n') || fail "ARGS has a quote without its partner: $ARGS"
        while IFS= read -r argument; do OPTIONS+=("$argument"); done <<<"$arguments"
    fi
}

recipes() { (cd experiments && for file in *.yaml; do printf '%s ' "${file%.yaml}"; done) | sed 's/base //; s/ $//'; }

# The folder of a run that has not been given one, the same in every job of its chain.
run_dir_of() { printf '%s/%s/%s/seed%s/%s' "${RUNS:-runs}" "${APPROACH:-film}" "${PRESET:-mini}" "${SEED:-0}" "$1"; }

# Turn "H:MM", "H:MM:SS", "D-HH:MM:SS" or minutes into seconds. $1: the variable that has it.
seconds_of() {
    local days=0 text=${!1} a b c
    case $text in
    *-*) days=${text%%-*} text=${text#*-} ;;
    esac
    case $text in
    '' | *[!0-9:]* | *:*:*:*) fail "$1=${!1} is not a time; write H:MM, such as 2:00." ;;
    esac
    IFS=: read -r a b c <<<"$text"
    if [ -z "$b" ]; then
        echo $((days * 86400 + 10#$a * 60))
    else
        echo $((days * 86400 + 10#$a * 3600 + 10#$b * 60 + 10#${c:-0}))
    fi
}

# Change when a step has been made: every checkpoint that is written follows one.
checkpoint_mark() { stat -c '%Y.%s.%i' "$RUN_DIR/checkpoints/last.ckpt" 2>/dev/null || echo none; }

# Whether the run was told to stop, and has saved where it stands. Exit code 75 says so too, but a launcher that ends the
# other processes of a run after the first may give the code of one that it has killed.
stopped() { [ -f "$RUN_DIR/checkpoints/stopped" ]; }

# Run a command so that this shell's traps work while it does; set CODE to its exit code.
# shellcheck disable=SC2034 # CODE is for the caller
run_trapped() {
    local status
    "$@" &
    CHILD=$! CODE=
    while :; do
        SIGNALLED=
        status=0
        wait "$CHILD" || status=$?
        # 127: there is no such child any more; the first time, no such command
        [ "$status" = 127 ] && [ -n "$CODE" ] || CODE=$status
        [ -n "$SIGNALLED" ] || break # else the wait was broken off, not the child
    done
    CHILD=
}

# Whether the run has ended: then its results are there, whatever code the launcher gave.
finished() { [ "$CODE" = 0 ] && [ -f "$RUN_DIR/results.json" ]; }

# Count jobs in a row that made no step in RUN_DIR/.idle; fail at the second. $1: the mark from before the job.
made_a_step() {
    local idle=0
    if [ "$(checkpoint_mark)" != "$1" ]; then
        rm -f "$RUN_DIR/.idle"
        return 0
    fi
    [ ! -f "$RUN_DIR/.idle" ] || read -r idle <"$RUN_DIR/.idle"
    mkdir -p "$RUN_DIR" && echo $((idle + 1)) >"$RUN_DIR/.idle"
    [ $((idle + 1)) -lt 2 ]
}
