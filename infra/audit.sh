#!/usr/bin/env bash
# Report known vulnerabilities of the versions in constraints.txt: pip-audit (in its own environment) with the OSV database. If the
# database does not respond within three seconds, it prints a message and passes, so that lint works without a network.
# Fails on a vulnerability, unless IGNORED names it with the reason why it cannot be mended or does not matter here.
set -euo pipefail
unset CDPATH  # with it, cd may go elsewhere
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PIP_AUDIT="pip-audit==2.10.1"
OSV="${OSV_URL:-https://api.osv.dev/v1/query}"
TOOL="${AUDIT_VENV:-.venv/audit}"
IGNORED=()

skip() { echo "audit: skipped: $1"; exit 0; }

# Any answer will do, also that a query without a package is a bad one.
.venv/bin/python - "$OSV" <<'PYTHON' 2>/dev/null || skip "the advisory database $OSV does not answer"
import sys, urllib.error, urllib.request
try:
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], b"{}"), timeout=3)
except urllib.error.HTTPError as error:
    sys.exit(error.code >= 500)
PYTHON

if [ ! -x "$TOOL/bin/pip-audit" ]; then
    .venv/bin/python -m venv "$TOOL"
    "$TOOL/bin/python" -m pip install --quiet "$PIP_AUDIT" || skip "$PIP_AUDIT cannot be installed"
fi
"$TOOL/bin/pip-audit" --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
    --vulnerability-service osv --osv-url "$OSV" ${IGNORED[@]+"${IGNORED[@]/#/--ignore-vuln=}"}
