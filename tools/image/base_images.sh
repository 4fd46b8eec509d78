#!/usr/bin/env bash
# Compares the base images of the Dockerfile with their registries: each digest must exist there, and a newer image under
# the same tag is shown with its digest. It needs docker with buildx, and access to the registries.
#
#   tools/image/base_images.sh [DOCKERFILE]
#
# Exits with 1 when an image is not named by a digest, or when its registry does not have it.
set -euo pipefail
file=${1:-$(dirname "$0")/../../Dockerfile}
failed=0
digest() { docker buildx imagetools inspect "$1" --format '{{.Manifest.Digest}}'; }
while read -r name image; do
  case $image in
    *:*@sha256:????????????????????????????????????????????????????????????????) ;;
    *) echo "base_images.sh: $name=$image has no digest; write $image@sha256:..., as docker buildx imagetools inspect" \
      "prints it" >&2; failed=1; continue ;;
  esac
  tag=${image%@*}
  # `repository@digest`: an image is asked for by its content alone
  if ! digest "${tag%:*}@${image#*@}" >/dev/null; then
    echo "base_images.sh: the registry does not have ${image#*@} of $tag, or cannot be reached" >&2
    failed=1
    continue
  fi
  now=$(digest "$tag")
  if [ "$now" = "${image#*@}" ]; then
    echo "$name: $tag is the named image"
  else
    echo "$name: the named image exists; $tag is now $now: try it, and write that digest into $(basename "$file")"
  fi
done < <(sed -n 's/^ARG \([A-Z]*_IMAGE\)=/\1 /p' "$file")
exit "$failed"
