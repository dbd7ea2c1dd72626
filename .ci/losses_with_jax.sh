#!/usr/bin/env bash
# Runs the tests of the losses with one version of jax and nothing else of the extra `train`.
#
#   .ci/losses_with_jax.sh 0.7.2      that version; "newest" or nothing: whatever pip finds
#   .ci/losses_with_jax.sh 0.7.2 facade from_hidden      only these files, tests/test_NAME.py
#
# PYTHON names the interpreter. By default it is python3; for the newest jax, which needs a newer
# Python than the oldest that runs the losses, python3.13 where there is one.
set -euo pipefail

version=${1:-newest}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
jax=jax
[ "$version" = newest ] || jax="jax==$version"

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ "$version" = newest ]; then
  for found in python3.13 "$(pyenv root 2>/dev/null || true)"/versions/3.13*/bin/python3.13; do
    if "$found" -c '' 2>/dev/null; then python=$found && break; fi
  done
fi
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q "$root" "$jax" 'pytest>=8.4' 'pytest-timeout>=2.4' 'hypothesis>=6.150' 'pytest-xdist>=3.8'

# A copy, so that the installed package is what the tests import.
cp -r "$root/tests" "$root/pyproject.toml" "$work"
cd "$work"
"$work/venv/bin/python" -c 'import jax; print("jax", jax.__version__)'
tests=(divergences distillation fused_linear fused_linear_programs from_hidden credit support weights
  vocabulary tiles kl_penalty policy_gradient reductions likelihood token_stats facade teacher_weights
  reference_grid laws loss_properties bad_input)
[ $# -lt 2 ] || tests=("${@:2}")
files=()
for name in "${tests[@]}"; do files+=("tests/test_$name.py"); done
"$work/venv/bin/python" -m pytest -q -n 2 --dist loadfile -o pythonpath= "${files[@]}"
