#!/usr/bin/env bash
# Clips of UCF101 classes with the published settings, from the published weights.
# Settings may follow: bash sample/scripts/ucf101.sh classes=[Archery,5] cache=N3-900-50
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" ucf101 "$@"
