#!/usr/bin/env bash
# Minutes with a GPU on a machine without a network: what to carry there, what to run there, what to bring back.
#
#   benchmarks/on_gpu.sh pack IMAGES          # here: carried/ with images as mosaics, and wheels named in WHEELS
#   benchmarks/on_gpu.sh run MINUTES OUT      # there, with the repository, carried/ and runs/gpu if it is here
#   benchmarks/on_gpu.sh unpack OUT           # here again: records and teachers to benchmarks/results/gpu
#
# IMAGES has mosaics, or is where torchvision keeps CIFAR (which it downloads there). DATASET and IMBALANCE say which
# images to carry, cifar10 at 50 if not set. WHEELS="torchopt==0.7.3 higher==0.2.1" carries packages that are missing
# there, for Python 3.12 on x86-64 Linux; without them their jobs are skipped or their peers fail alone. TRAVELS is the
# largest checkpoint, in MB, for which there is room on the way to the next run. CARRIED is another folder than carried/,
# and VALIDATION=3000 adds images to it that the plan choice sets aside.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
carried=${CARRIED:-carried}

case "${1:-}" in
pack)
    dataset=${DATASET:-cifar10}
    "$python" -m benchmarks.longtail.mosaics "$dataset" --from "${2:?IMAGES}" --to "$carried/$dataset" \
        --imbalance "${IMBALANCE:-50}" --validation "${VALIDATION:-1000}"
    if [ -n "${WHEELS:-}" ]; then
        # shellcheck disable=SC2086 # several packages
        "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
            --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$carried/wheels" $WHEELS
    fi
    { git ls-files -z; find "$carried" runs/gpu/table -type f -print0 2>/dev/null || true; } |
        xargs -0 du --bytes --total | awk '$2 == "total" { bytes += $1 }
            END { printf "%.1f MiB travel, of 64\n", bytes / 2^20; exit bytes > 64 * 2^20 }'
    ;;
run)
    minutes=${2:?MINUTES} out=${3:?OUT}
    if ls "$carried"/wheels/*.whl >/dev/null 2>&1; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target runs/site "$carried"/wheels/*.whl
        export PYTHONPATH="$PYTHONPATH:$PWD/runs/site"
    fi
    mkdir -p "$out" runs/gpu/table
    finish() { tar --create --gzip benchmarks/results/gpu runs/gpu/table | split --bytes 15M - "$out/gpu.tgz."; }
    trap finish EXIT # also where the jobs end early
    "$python" benchmarks/on_gpu.py --minutes "$minutes" --data "$carried" --travels "${TRAVELS:-4}" "${@:4}"
    ;;
unpack)
    cat "${2:?OUT}"/gpu.tgz.* | tar --extract --gzip
    ;;
*)
    sed -n '2,14p' "$0"
    exit 2
    ;;
esac
