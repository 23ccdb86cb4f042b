"""Everything that needs a GPU, in one call: what the machine can do, the CUDA tests, the time of a decode step.

    python experiments/gpu_check.py

Needs one CUDA GPU with 8 GB free, and 8 GB of host memory; takes a few minutes. Exit status 1 if anything fails.
"""
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from sentencekv import zero_copy_works

def gigabytes_per_second(target, source, times=10):
    """Median bandwidth of target.copy_(source), in bytes of the source."""
    rates = []
    for _ in range(times + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        rates.append(source.nbytes / start.elapsed_time(end) / 1e6)
    return statistics.median(rates[2:])

def main():
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to check here")
    device = torch.device("cuda", torch.cuda.current_device())
    host = torch.ones(1 << 30, dtype=torch.uint8, pin_memory=True)
    here, there = (torch.ones(1 << 30, dtype=torch.uint8, device=device) for _ in range(2))
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"host to device {gigabytes_per_second(here, host):.1f} GB/s, device to host "
          f"{gigabytes_per_second(host, here):.1f} GB/s, on the device {gigabytes_per_second(there, here):.0f} GB/s")
    print(f"zero copy {'works' if zero_copy_works(device) else 'does NOT work: fetches are staged'}", flush=True)
    del host, here, there
    tests = [sys.executable, "-m", "pytest", "-q", "-rs", "-k", "cuda or gpu or in_flight"]
    speed = [sys.executable, str(ROOT / "experiments" / "speed.py"), "--device", "cuda"]
    sys.exit(max(subprocess.run(command, cwd=ROOT).returncode for command in (tests, speed)) and 1)

if __name__ == "__main__":
    main()
