#!/usr/bin/env bash
# The proof on a GPU: all tests that need one, then the speed of the kernels, and of all-reduces against the kernel. Writes
# one JSON file and one text table.
#
#   benchmarks/gpu_report.sh [FOLDER]      default: benchmarks/results
#
# Needs a GPU, no network, and a python (PYTHON=...) with cupy, grpcio, protobuf, ml_dtypes, prometheus-client, rich, typer,
# pytest and pytest-benchmark; the package itself is taken from this checkout. Takes less than 8 minutes.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${1:-benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

"$python" benchmarks/gpu_report.py check
mkdir -p "$folder"
pytest() { "$python" -m pytest -c benchmarks/gpu_report.ini --rootdir . -p no:cacheprovider "$@"; }

status=0
timeout 300 "$python" -m dsml_gpu kernels build --gpu 0
pytest tests/gpu -m gpu -q --junitxml="$work/tests.xml" || status=$?
pytest benchmarks/test_kernels.py -m gpu -q --benchmark-json="$work/kernels.json" || status=$?
"$python" benchmarks/gpu_all_reduce.py --json "$work/all_reduce.json" || status=$?
"$python" benchmarks/gpu_report.py write "$work" "$folder"
exit $status
