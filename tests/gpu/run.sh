#!/usr/bin/env bash
# The acceptance of the CUDA backend on a machine with a card: see README.md. Needs what build.sh made, a driver, and python3 with
# torch, transformers, safetensors and pillow; neither a Rust toolchain nor the network. Arguments go to run.py; results go to $OUT.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 TOKENIZERS_PARALLELISM=false
OUT=${OUT:-target/gpu-results}

# NVRTC and cuBLASLt of CUDA 13: torch's wheels bring them, else a toolkit. What is on LD_LIBRARY_PATH already goes first. The
# driver is where the system's loader finds it, or where containers mount it.
folders=$(python3 - <<'PYTHON'
import ctypes, glob, os, sysconfig
site = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
places = [f"{s}/nvidia/**" for s in site] + ["/usr/local/cuda*/lib64", "/usr/local/cuda*/targets/x86_64-linux/lib"]
found = [[file for place in places for file in sorted(glob.glob(f"{place}/{library}", recursive=True))] for library in ("libnvrtc.so.13", "libcublasLt.so.13")]
print(*dict.fromkeys(os.path.dirname(files[0]) for files in found if files))
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    found = glob.glob("/usr/local/nvidia/lib*/libcuda.so.1") + glob.glob("/usr/local/cuda*/compat/libcuda.so.1")
    print(os.path.dirname(found[0]) if found else "")
PYTHON
) || exit 1
for folder in $folders; do
    LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
done
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}
echo "libraries: ${LD_LIBRARY_PATH:-none found}"

# Checkpoints are 21 GB: in memory where it has room.
base=${TMPDIR:-/tmp}
room=$(df --output=avail -B1 /dev/shm 2>/dev/null | tail -1)
if [ "${room:-0}" -gt 24000000000 ]; then base=/dev/shm; fi
work=$(mktemp -d "$base/idefics-gpu-XXXXXX") || exit 1
trap 'rm -rf "$work"' EXIT
# Kernels are compiled once for all parts, and compiled by this run.
export XDG_CACHE_HOME=$work/cache

# A signal may reach this shell alone: it goes on to run.py, which ends what it started and still says what it has. This shell waits
# for that, so that the folder goes last; `wait` returns when a signal comes, too.
trap 'kill "${!-}" 2>/dev/null || exit 143' TERM INT
python3 tests/gpu/run.py --work "$work" --out "$OUT" "$@" &
while wait "$!"; kill -0 "$!" 2>/dev/null; do :; done
wait "$!"
