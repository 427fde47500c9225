#!/usr/bin/env bash
# Pictures of ImageNet classes with the published settings, from the published weights.
# Settings may follow: bash sample/scripts/imagenet.sh classes=[207,88] cache=N3-1000-21
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" imagenet "$@"
