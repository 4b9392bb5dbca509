#!/usr/bin/env bash
# Everything that needs a GPU, in one command: tests, compute-sanitizer, then latencies with what the card itself can do.
set -uo pipefail

usage() {
  cat <<'END'
Usage: benchmarks/gpu.sh [FOLDER]

On a machine with an NVIDIA GPU, a CUDA build of torch >= 2.11 and triton >= 3.6, from a checkout of flashprune. Builds
it where the build tools are, with nvcc >= 12.8 the CUDA library too; runs the GPU tests of both backends,
compute-sanitizer on small shapes where it is installed, and the benchmarks, CUDA beside Triton; and writes Markdown
tables and logs into FOLDER (default: $OUT, else bench/gpu of the checkout). A step that fails or a backend that cannot
run is recorded in FOLDER/summary.md and the rest goes on.

  PYTHON=python3   the Python to use, with torch, triton, pytest and hypothesis installed

Exit code: 0 all steps passed, 1 a step failed, 2 nothing could be run.
END
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  -*) usage >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
out=${1:-${OUT:-$(dirname "$0")/../bench/gpu}}
[[ $out = /* ]] || out=$PWD/$out
[[ $python = */* && $python != /* ]] && python=$PWD/$python
cd "$(dirname "$0")/.." || exit 2

if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "benchmarks/gpu.sh: $python has no torch: install a CUDA build of it, or name another: PYTHON=…" >&2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "benchmarks/gpu.sh: no GPU: torch.cuda.is_available() is False" >&2
  exit 2
fi
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2

failed=0
summary=$out/summary.md
{
  echo "| step | result | seconds |"
  echo "|---|---|---|"
} >"$summary"

# run NAME COMMAND...: its output into FOLDER/NAME.log, its result into the summary
run() {
  local name=$1 started=$SECONDS code result
  shift
  echo "== $name: $*"
  "$@" >"$out/$name.log" 2>&1
  code=$?
  result=passed
  if [ $code -ne 0 ]; then
    result="failed (exit $code), see $name.log"
    failed=1
  fi
  tail -n 3 "$out/$name.log"
  echo "| $name | $result | $((SECONDS - started)) |" >>"$summary"
  return $code
}

skip() {
  echo "== $1: skipped, $2"
  echo "| $1 | skipped: $2 | 0 |" >>"$summary"
}

# With the build tools here the checkout is installed; without them it runs from a folder of links, with the libraries
# that were built elsewhere and brought along, if any.
if [ -e python/flashprune/libflashprune_cuda.so ] && ! command -v "${CUDACXX:-nvcc}" /usr/local/cuda/bin/nvcc >/dev/null; then
  skip build "no nvcc: with the libraries that are there"
elif "$python" -c 'import cmake, ninja, setuptools' 2>/dev/null; then
  run build "$python" -m pip install --no-build-isolation --no-deps --editable .
else
  skip build "no cmake, ninja and setuptools: without native code"
fi
if ! "$python" -c 'import flashprune.triton_kernels' 2>/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  mkdir "$site/flashprune"
  ln -s "$PWD"/python/flashprune/* "$site/flashprune/"
  ln -s "$PWD/triton_kernels" "$site/flashprune/triton_kernels"
  ln -s "$PWD/benchmarks" "$site/flashprune/benchmarks"
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
run backends "$python" -c 'import sys, flashprune as fp; b = fp.backends(); print(*b.items(), sep="\n"); sys.exit("ready" not in (b["cuda"], b["triton"]))'
for backend in cuda triton; do
  status=$("$python" -c "import flashprune as fp; print(fp.backends()['$backend'])" 2>&1 | tail -n 1)
  [ "$status" = ready ] || skip "$backend" "$status"
done

run gpu_tests "$python" -m pytest -q -m gpu -rs tests
if "$python" -c 'from flashprune.cli import app' 2>/dev/null; then
  run validate "$python" -c 'from flashprune.cli import app; app(["validate", "--device", "cuda"])'
else
  skip validate "no typer and rich"
fi
run triton_tests "$python" -m pytest -q -s tests/test_triton_*.py

if sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null); then
  for tool in memcheck racecheck synccheck; do
    # torch's caching allocator would hide reads past the end of a tensor
    run "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 9 \
      "$python" -m benchmarks.gpu --small
  done
else
  skip sanitizer "no compute-sanitizer"
fi

if run latencies "$python" -m benchmarks.gpu; then
  cp "$out/latencies.log" "$out/latencies.md"
fi
if "$python" -c 'import flashprune.integrations.transformers' 2>/dev/null; then
  if run models "$python" -W ignore -m benchmarks.gpu_models; then
    cp "$out/models.log" "$out/models.md"
  fi
else
  skip models "no Transformers that is new enough"
fi

cat "$summary"
exit $failed
