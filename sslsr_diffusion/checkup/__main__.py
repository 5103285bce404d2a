"""python -m sslsr_diffusion.checkup: `sslsr check-gpu` where the packages of the command line are not installed."""

import argparse
import sys
from pathlib import Path

from sslsr_diffusion.checkup.everything import OUTPUT, check_gpu
from sslsr_diffusion.errors import UserError

parser = argparse.ArgumentParser(prog="python -m sslsr_diffusion.checkup", description="Find out what works on this machine's GPU.")
parser.add_argument("--minutes", type=float, default=10.0, help="for all steps together")
parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the result")
given = parser.parse_args()
try:
    sys.exit(check_gpu(given.minutes, given.output, print))
except (UserError, OSError) as error:
    parser.error(str(error))
