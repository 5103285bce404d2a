"""accelerate launch train.py --config configs/sd_upscaler_ssl.yaml"""

from sslsr_diffusion.cli import single
from sslsr_diffusion.cli.train import train

if __name__ == "__main__":
    single(train)
