#!/usr/bin/env bash
# Time-lapse clips of the sky with the published settings, from the published weights.
# Settings may follow: bash sample/scripts/sky.sh num_samples=8 cache=N3-900-50
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" sky "$@"
