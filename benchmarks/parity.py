"""Compare with the authors' figures: one line a case, exit status 1 if one fails.

    python benchmarks/parity.py tests/golden/*.json

Runs on the CPU in float32; about 5 seconds a case on two cores.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from golden import Case

TOLERANCES = {
    "losses": 1e-3,
    "gradients": 5e-3,
    "outputs": 1e-3,
    "iou_gap": 1e-2,
    "score_gap": 1e-3,
    "trajectory": 1e-2,
}


def main() -> int:
    """Run all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path, help="golden cases (json)")
    failed = 0
    for path in parser.parse_args().cases:
        torch.manual_seed(0)
        figures = Case(json.loads(path.read_text())).run()._asdict()
        wrong = [name for name, value in figures.items() if value is not None and not value <= TOLERANCES[name]]
        failed += bool(wrong)
        columns = "  ".join(f"{name} {value:.1e}" for name, value in figures.items() if value is not None)
        print(f"{'FAIL' if wrong else 'ok  '}  {path.stem:36s} {columns}", flush=True)
    print(f"{failed} of the cases failed" if failed else "all cases agree")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
