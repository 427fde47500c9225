#!/usr/bin/env bash
# Clips of moving digits from the small pipeline that the repository carries.
# Settings may follow: bash sample/scripts/demo.sh classes=[3,7] cache=off format=[gif,png]
exec bash "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/common.sh" digits "$@"
