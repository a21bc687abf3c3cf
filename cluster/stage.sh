#!/usr/bin/env bash
# Copy a folder of shards to this node's own disk, verified; run by one task a node. It never fails a job: where there
# is no disk, no room or a broken copy, it says so in a sentence, and training reads the shared folder there.
#   stage.sh SHARDS COPY       copy what `wlsup data prepare` wrote
#   stage.sh --remove COPY     take the copy away again
set -euo pipefail

say() { printf 'wlsup: %s: %s\n' "$(hostname)" "$*" >&2; }
shared() {
    [ -z "${making:-}" ] || rm -rf -- "$making" # half a copy is no use
    say "$*; the shards are read from the shared file system"
    exit 0
}

if [ "${1:-}" = --remove ]; then
    case ${2:?give the copy} in
    */wlsup-*) rm -rf -- "$2" ;; # only what the job's own script has named
    *) say "$2 is not a copy of wlsup's; nothing is removed" ;;
    esac
    exit 0
fi
source=${1:?give the folder of shards} copy=${2:?give where to copy it}
source=$(cd "$source" 2>/dev/null && pwd -P) || shared "there is no folder $1 to copy"
parent=$(dirname "$copy")
if ! [ -d "$parent" ] || ! [ -w "$parent" ]; then
    shared "there is no disk of the node's own at $parent (alloc_flags nvme; NVME=DIR)"
fi
if [ "$(head -n 1 "$copy/.wlsup-staged" 2>/dev/null)" = "$source" ]; then
    say "$copy is there already" # a job that was requeued on the same node
    exit 0
fi
needed=$(du -sLk "$source" | cut -f1)
free=$(df -Pk "$parent" | awk 'NR == 2 {print $4}')
[ "$needed" -lt "$free" ] || shared "$parent has $free KiB free, and the shards need $needed"

making=$copy began=$SECONDS
mkdir -p "$copy" || shared "$copy cannot be made"
for file in "$source"/*; do
    [ -f "$file" ] || continue
    part=$copy/.part name=$(basename "$file")
    # one pass over the shared file system gives the copy and its sum; the copy is then read back
    sum=$(tee "$part" <"$file" | sha256sum) || shared "$file could not be copied to $copy"
    [ "$sum" = "$(sha256sum <"$part")" ] || shared "the copy of $file in $copy differs from what was read"
    mv "$part" "$copy/$name" || shared "$copy/$name cannot be written"
done
{ printf '%s\n' "$source" >"$copy/.part" && mv "$copy/.part" "$copy/.wlsup-staged"; } ||
    shared "$copy cannot be written"
say "staged $source in $copy, $needed KiB in $((SECONDS - began)) s"
