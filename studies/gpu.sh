#!/usr/bin/env bash
# What a machine with one GPU can tell, in at most 9 minutes:
#
#   OUT=results studies/gpu.sh [--smoke] [suite] [steps] [trainings]
#
# Without a name all three parts:
#
# suite      The tests that one device can run, on JAX and PyTorch, while the programs of
#            the steps are compiled: suite.jax.jsonl and suite.torch.jsonl, a line each.
# steps      NRS, SAM, RPR, ... over plain Keras, with the kernels that the GPU runs, and
#            memory: steps.jsonl, a line per method.
# trainings  Of the study on a GPU: runs/, which begins with a copy of studies/runs.
#            Copy the files of the tasks back from there: they hold what they held, and
#            more.
#
# Each part has a limit of its own, and its lines are kept if it is cut. The rest is in
# log.txt. --smoke does the same on a CPU, with few tests, a tiny network and one small
# task, in 2 to 3 minutes.
#
# The machine needs Python with JAX, PyTorch, SciPy, scikit-learn, pandas, matplotlib,
# pytest, pytest-xdist and hypothesis, and no network. Two folders may travel with the
# repository:
#   wheels/         pip download --no-deps -d wheels keras namex, and optree with that
#                   machine's --python-version and --platform
#   fashion-mnist/  the four files of Debian's package dataset-fashion-mnist
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?Set OUT to the folder of the results.}"
mkdir -p "$OUT/runs"
OUT=$(realpath "$OUT")
exec > >(tee -a "$OUT/log.txt") 2>&1

python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'kill $(jobs -p) 2> /dev/null; rm -rf "$work"' EXIT
start=$(date +%s)
export PYTHONPATH="$work/site:$PWD" TF_CPP_MIN_LOG_LEVEL=3 PYTHONUNBUFFERED=1
# Many processes share the GPU, and compile the same programs.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR="$work/cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.2

total=540 suite=150 steps=170
networks=(MLP ResNet18 ViT-Ti/4 WRN-28-10)
tests=(tests/trainers tests/step tests/perturbations tests/backend tests/test_*.py
    tests/flatness tests/models tests/system keras_nrs)
workers=6
tasks=(fashion-resnet18-10000 fashion-vit-ti-10000)
arms=()
if [[ ${1:-} == --smoke ]]; then
    total=170 suite=65 steps=35
    networks=(smoke)
    tests=(tests/test_noise.py tests/test_labels.py tests/test_checks.py)
    workers=0
    tasks=(mnist1d-cnn-1000)
    arms=(--arms baseline)
    export OMP_NUM_THREADS=1
    shift
fi
parts=" ${*:-suite steps trainings} "
for name in $parts; do
    if [[ ! $name =~ ^(suite|steps|trainings)$ ]]; then
        echo "A part must be suite, steps or trainings. Received: $name" >&2
        exit 2
    fi
done

asked() {
    [[ $parts == *" $1 "* ]]
}
# Compiling takes as long without the suite.
asked suite || steps=230

# Seconds that a part may take, of those that it asks for.
left() {
    local rest=$((start + total - $(date +%s)))
    echo $(($1 < rest ? $1 : rest))
}

part() {
    echo "== $* ($(($(date +%s) - start)) s)"
}

if compgen -G "wheels/*.whl" > /dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile \
        --target "$work/site" wheels/*.whl
fi
if [[ -d fashion-mnist ]]; then
    mkdir -p "$work/keras/datasets"
    ln -s "$PWD/fashion-mnist" "$work/keras/datasets/fashion-mnist"
    export KERAS_HOME="$work/keras"
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
KERAS_BACKEND=jax "$python" -c "import sys, jax, keras, torch; print(sys.version, jax.__version__,
    keras.__version__, torch.__version__, jax.devices(), torch.cuda.is_available())"

timed=()
if asked steps; then
    part "compiling for the steps"
    for backend in jax torch; do
        for network in "${networks[@]}"; do
            KERAS_BACKEND=$backend timeout -k 5 "$(left $((suite + steps)))" \
                "$python" -m tests.benchmarks.one_gpu "$network" "$OUT/steps.jsonl" \
                "$work/go" $((start + suite + steps)) 2>&1 |
                sed "s|^|$network, $backend: |" &
            timed+=($!)
        done
    done
fi

if asked suite; then
    part "suite"
    # In full precision, as tests compare numbers: by default a GPU rounds factors to
    # 10 bits.
    tested=()
    for backend in jax torch; do
        KERAS_BACKEND=$backend NVIDIA_TF32_OVERRIDE=0 \
            JAX_DEFAULT_MATMUL_PRECISION=highest timeout -k 5 "$(left $suite)" \
            "$python" -m pytest -q -n $workers \
            -p studies.suite_record --record "$OUT/suite.$backend.jsonl" \
            -m "not slow and not several_devices" -W default --tb=no --no-header \
            --continue-on-collection-errors --doctest-ignore-import-errors \
            "${tests[@]}" > "$work/suite.$backend" 2>&1 &
        tested+=($!)
    done
    wait "${tested[@]}"
    for backend in jax torch; do
        echo "$backend: $(grep -c '"passed"' "$OUT/suite.$backend.jsonl") passed," \
            "$(grep -c '"failed"' "$OUT/suite.$backend.jsonl") failed," \
            "$(grep -c '"package missing"' "$OUT/suite.$backend.jsonl") lack a package"
        tail -n 3 "$work/suite.$backend"
    done
fi

if asked steps; then
    part "steps"
    until (($(grep -c ': ready$' "$OUT/log.txt") == ${#timed[@]} ||
        $(date +%s) >= start + suite)); do
        sleep 1
    done
    touch "$work/go"
    wait "${timed[@]}"
    cat "$OUT/steps.jsonl"
fi

if asked trainings; then
    part "trainings"
    for task in "${tasks[@]}"; do
        if [[ -f studies/runs/$task.jsonl ]]; then
            cp "studies/runs/$task.jsonl" "$OUT/runs"
        fi
    done
    seconds=$(left $total)
    # Runs under way are finished: so the last one starts before the time is over.
    KERAS_BACKEND=jax timeout -k 5 "$seconds" "$python" -m studies --processes 1 \
        --minutes "$(awk "BEGIN {print $seconds * 0.8 / 60}")" --folder "$OUT/runs" \
        --tasks "${tasks[@]}" ${arms[@]+"${arms[@]}"}
    rm -f "$OUT"/runs/.lock
fi
shopt -s nullglob
wc -l "$OUT"/*.jsonl "$OUT"/runs/*.jsonl
part "done"
