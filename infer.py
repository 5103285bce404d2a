"""python infer.py --input lr/"""

from sslsr_diffusion.cli import single
from sslsr_diffusion.cli.infer import infer

if __name__ == "__main__":
    single(infer)
