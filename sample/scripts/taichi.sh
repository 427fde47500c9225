#!/usr/bin/env bash
# Tai chi clips with the published settings, from the published weights.
# Settings may follow: bash sample/scripts/taichi.sh num_samples=8 cache=N3-900-50
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" taichi "$@"
