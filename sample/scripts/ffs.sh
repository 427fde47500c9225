#!/usr/bin/env bash
# Clips of talking faces with the published settings, from the published weights.
# Settings may follow: bash sample/scripts/ffs.sh num_samples=8 cache=N3-900-50
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" ffs "$@"
