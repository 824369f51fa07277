#!/usr/bin/env bash
# Writes requirements-build.lock and requirements.lock anew: the newest versions that pyproject.toml allows, with the
# hash of every file of each version, from the public index whatever this machine's pip is set to. Run it on the oldest
# Python that is supported: newer ones need less, never more (the set-up runs `pip check` on each machine).
set -euo pipefail
cd "$(dirname "$0")/../.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
"${PYTHON:-python3.11}" -m venv "$tools"
"$tools/bin/pip" install --quiet pip-tools

# Without the header and the options, nothing in the files names a host or a path.
unset PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_FIND_LINKS
export PIP_CONFIG_FILE=/dev/null CUSTOM_COMPILE_COMMAND=scripts/lib/lock.sh
compile() {
    "$tools/bin/pip-compile" --quiet --generate-hashes --allow-unsafe --strip-extras --upgrade --no-header \
        --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --no-emit-options "$@"
}
compile --output-file=requirements-build.lock requirements-build.in
compile --extra=dev --constraint=requirements-build.lock --output-file=requirements.lock pyproject.toml
